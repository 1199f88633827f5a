"""`fedex-scale doctor` says on a line each what there is, and by its exit code whether it does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from resuming import write_config

from fedex_scale.cli import main
from fedex_scale.config.load import load_config
from fedex_scale.engine import ops
from fedex_scale.planning import doctor
from fedex_scale.planning.choice import make_plan
from fedex_scale.planning.machine import this_machine


def examine(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *map(str, arguments)])
    return ended.value.code or 0, capsys.readouterr().out.splitlines()


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_config(tiny_llama, tmp_path)


def test_without_a_config_nothing_is_fatal(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = examine(capsys)
    assert code == 0
    names = "python torch DeepSpeed bitsandbytes hub disk RAM".split()
    assert all(any(f"  {name}: " in line for line in lines) for name in names)


def test_a_sound_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = examine(capsys, "--config", config)
    assert code == 0, lines
    assert "ok    model: can be used" in lines


def test_it_and_a_plan_say_the_same(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = examine(capsys, "--config", config)
    planned = make_plan(load_config(config), this_machine()).chosen
    for place, name in (("host", "RAM"), ("disk", "disk")):
        (line,) = [line for line in lines if f"  {name}: " in line]
        assert line.endswith(f", {planned.total(place) / 1e9:.2f} GB needed")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path=./nowhere", "FAIL  model: model.path: expected a model directory"),
        ("evaluation.tasks=[fedex_word_problem]", "FAIL  evaluation: evaluation.tasks: unknown"),
        ("engine.deepspeed=nowhere.json", "FAIL  engine: engine.deepspeed: cannot read"),
        ("federation.rounds=100000 lora.rank=4096", "FAIL  disk: "),
    ],
)
def test_a_config_that_cannot_run(
    override: str, expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = examine(capsys, "--config", config, *override.split())
    assert code == 1
    assert any(line.startswith(expected) for line in lines), lines


@pytest.mark.parametrize("has_toolkit", [True, False])
def test_what_nvme_needs_is_named(
    has_toolkit: bool, config: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacks = None if has_toolkit else "install the CUDA toolkit"
    monkeypatch.setattr(ops, "lacks_for_aio", lambda: lacks)
    nvme = ["engine.deepspeed=zero3_nvme", f"engine.nvme_path={tmp_path}"]
    code, lines = examine(capsys, "--config", config, *nvme)
    (line,) = [line for line in lines if "AIO (NVMe)" in line]
    assert line.startswith("ok" if has_toolkit else "FAIL")
    assert (code == 0) == has_toolkit
    _, lines = examine(capsys, "--config", config, "engine.deepspeed=zero2")
    assert not any("AIO" in line for line in lines)


def test_a_card_without_its_toolkit_builds_no_aio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(ops.torch.cuda, "is_available", lambda: True)
    assert "CUDA_HOME" in ops.lacks_for_aio()


def test_a_package_that_is_missing_counts_where_it_is_wanted(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    code, lines = examine(capsys, "--config", config)
    assert code == 0
    assert any(line.startswith("note  bitsandbytes: not installed; pip") for line in lines)
    code, _ = examine(capsys, "--config", config, "train.optimizer=adamw_8bit")
    assert code == 1
    zero2 = Path(__file__).parents[3] / "ds_configs" / "zero2.json"
    code, lines = examine(capsys, "--config", config, f"engine.deepspeed={zero2}")
    assert code == 1
    assert any(line.startswith("FAIL  DeepSpeed: not installed") for line in lines)


def test_a_stale_lock_is_named(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = tmp_path / "extensions" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    _, lines = examine(capsys, "--config", config)
    assert any(f"rm {lock}" in line for line in lines)
