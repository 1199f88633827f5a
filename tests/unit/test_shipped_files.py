"""Every YAML and JSON that is shipped is accepted by what will read it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from rows import write_data

from fedex_scale.config.learning import EngineSection
from fedex_scale.config.load import load_config
from fedex_scale.config.settings import EvaluationSection
from fedex_scale.engine.build import read_ds_config
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import evaluation

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
ACCELERATE = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
TASKS = sorted((ROOT / "eval" / "tasks").glob("*.yaml"))


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe(path: Path) -> None:
    config = load_config(path)
    assert config == load_config(path.stem)
    assert config.run.name
    launched = path.read_text(encoding="utf-8").splitlines()[1]
    assert launched == f"# fedex-scale run --config {path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_an_editor_finds_no_mistake_in_a_recipe_and_every_mistake_beside_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.match("# yaml-language-server: [$]schema=(.+)\n", text)
    schema = json.loads((path.parent / named[1]).read_text(encoding="utf-8"))
    config = yaml.safe_load(text)
    jsonschema.validate(config, schema)
    for section in config:
        broken = config | {section: config[section] | {"unknown": 1}}
        with pytest.raises(jsonschema.ValidationError, match="'unknown' was unexpected"):
            jsonschema.validate(broken, schema)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=by_name)
def test_deepspeed_config_leaves_nothing_to_fill_in(path: Path) -> None:
    filled = read(path, nvme_path="/nvme" if "nvme" in path.stem else None)
    assert "auto" not in list(leaves(filled))
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": path.stem != "zero0"}
    before = json.loads(path.read_text(encoding="utf-8"))
    assert list(filled["zero_optimization"]) == list(before["zero_optimization"])


def test_zero_0_in_bfloat16_is_refused() -> None:
    section = EngineSection(deepspeed=str(ROOT / "ds_configs" / "zero0.json"))
    sizes = {"micro_batch_size": 2, "accumulation": 3, "max_grad_norm": 0.5, "largest_weight": 9}
    with pytest.raises(UserError, match="use zero2"):
        read_ds_config(section, bf16=True, **sizes)


def test_offload_to_nvme_needs_to_know_where() -> None:
    with pytest.raises(UserError, match=r"nvme_path: auto with; set engine\.nvme_path"):
        read(ROOT / "ds_configs" / "zero3_nvme.json", nvme_path=None)


@pytest.mark.parametrize("path", ACCELERATE, ids=by_name)
def test_accelerate_config(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    assert config["num_processes"] >= 1


def test_examples_for_many_machines() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    hosts = fetch_hostfile(str(ROOT / "launch" / "hostfile.example"))
    assert hosts == {"node1": 8, "node2": 8}
    script = ROOT / "launch" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_lm_eval_finds_every_task_shipped_or_named(tmp_path: Path) -> None:
    data_dir = str(write_data(tmp_path / "data"))
    files = [yaml.load(path.read_text(encoding="utf-8"), SkipTags) for path in TASKS]
    shipped = [file.get("group", file["task"]) for file in files]
    assert shipped
    assert len(set(shipped)) == len(shipped)
    named = [task for path in RECIPES for task in load_config(path).evaluation.tasks]
    for task in {*shipped, *named}:
        evaluation.check_tasks(EvaluationSection(tasks=(task,), data_dir=data_dir))


def read(path: Path, *, nvme_path: str | None) -> dict[str, Any]:
    return read_ds_config(
        EngineSection(deepspeed=str(path), nvme_path=nvme_path),
        micro_batch_size=2,
        accumulation=3,
        max_grad_norm=0.5,
        bf16=path.stem != "zero0",
        largest_weight=1000,
    )


def leaves(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        for value in node.values():
            yield from leaves(value)
    else:
        yield node


class SkipTags(yaml.SafeLoader):
    """Reads past lm-eval's own tags, such as !function."""


SkipTags.add_multi_constructor("!", lambda loader, suffix, node: None)
