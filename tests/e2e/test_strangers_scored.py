"""Models and adapters of strangers that are scored: one line, and no code of theirs runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rows import write_data
from safetensors.torch import load_file, save_file
from tiny import random_pairs, save_adapter

from fedex_scale.cli import main
from fedex_scale.config.settings import EvaluationSection
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import evaluation

LAYER = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pairs = random_pairs({LAYER: (64, 48)}, rank=2, seed=0)
    return save_adapter(tmp_path / "adapter", pairs, alpha=4)


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "base")


def told(capsys: pytest.CaptureFixture[str], base: Path, *arguments: object) -> str:
    """Return the one line that refuses to score."""
    data = base.parent / "data"
    shared = [
        "--suite",
        "fedex_gsm8k",
        "--data-dir",
        str(data if data.exists() else write_data(data)),
    ]
    shared += ["--limit", "1"]
    out = base.parent / "out"
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(base), *map(str, arguments), *shared, "--out", str(out)])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("error: ")) == (2, 1), error
    assert not out.exists()
    return next(x for x in error.splitlines() if x.startswith("error: "))


def change(file: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_what_computes_nan_is_not_scored_as_wrong(
    number: float, where: str, base: Path, adapter: Path, capsys
) -> None:
    if where == "adapter":
        name = f"base_model.model.{LAYER}.lora_B.weight"
        change(adapter / WEIGHTS, name, torch.full((64, 2), number))
    else:
        shard = next(
            x for x in base.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(x)
        )
        weight = load_file(shard)["model.embed_tokens.weight"]
        weight[7] = number
        change(shard, "model.embed_tokens.weight", weight)
    assert "got NaN or Inf" in told(capsys, base, "--adapter", adapter)


@pytest.mark.parametrize(
    ("module", "shape"), [("", (3, 3)), ("model", (3, 3)), ("lm_head", (303, 40))]
)
def test_whole_weights_that_the_model_lacks(
    module: str, shape: tuple[int, int], base: Path, adapter: Path, capsys, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": [module]}))
    change(adapter / WEIGHTS, f"base_model.model.{module or 'x'}.weight", torch.ones(shape))
    assert "cannot be loaded on" in told(capsys, base, "--adapter", adapter)
    if module == "lm_head":
        out = str(tmp_path / "aggregated")
        with pytest.raises(SystemExit) as ended:
            main(["aggregate", "--base", str(base), "--out", out, str(adapter), str(adapter)])
        assert ended.value.code == 2
        assert "lm_head.weight: expected a weight as the base's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("config.json", "vocab_size", 10**9, "its config.json tells of"),
        ("generation_config.json", "num_beams", 10**6, "at most 64 beams"),
    ],
)
def test_numbers_that_would_take_all_memory(
    file: str, key: str, value: int, words: str, base: Path, capsys
) -> None:
    tree = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(tree | {key: value}))
    assert words in told(capsys, base)


def test_a_metric_is_not_what_lies_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code_eval").mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (tmp_path / "code_eval" / "code_eval.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    row = {"task_id": "a", "prompt": "def f():", "test": "", "entry_point": "f"}
    rows.write_text(json.dumps(row | {"canonical_solution": ""}) + "\n")
    section = EvaluationSection(tasks=("humaneval",), data={"humaneval": {"test": str(rows)}})
    with pytest.raises(UserError, match=r"would be run from .*code_eval, which lies where you are"):
        evaluation.check_tasks(section)
    assert not (tmp_path / "ran").exists()
