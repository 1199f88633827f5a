"""What a run that somebody else made can have done when it is scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from resuming import write_config
from transformers import dynamic_module_utils

from fedex_scale.run import run_config
from fedex_scale.scoring import post_hoc

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
(Path({marker!r})).touch()
class Own(LlamaForCausalLM):
    pass
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_only_the_caller_lets_a_models_code_run(
    trusted: bool,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run = run_config(write_config(tiny_llama, tmp_path), ["federation.rounds=1"])
    base, marker = tmp_path / "sent", tmp_path / "marker"
    shutil.copytree(tiny_llama, base)
    (base / "own.py").write_text(CODE.format(marker=str(marker)))
    settings = json.loads((base / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (base / "config.json").write_text(json.dumps(settings))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"path": str(base), "trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    asked = {"tasks": ("fedex_boolq",)}
    subject = post_hoc.find_subject(str(run), None, asked, trust_remote_code=trusted)
    post_hoc.load(subject)
    assert marker.exists() == trusted
    told = [line for line in caplog.messages if "trust_remote_code" in line]
    assert len(told) == (not trusted)
    assert all("ignored; pass --trust-remote-code" in line for line in told)
