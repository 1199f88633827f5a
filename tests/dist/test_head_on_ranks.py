"""A trained head on two gloo ranks: plain PyTorch, ZeRO-2 and ZeRO-3 come to the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import write_head_config
from safetensors.torch import load_file

from fedex_scale.runtime.distributed import free_port

ROOT = Path(__file__).parents[2]


def start(config: Path, name: str, *overrides: str, ranks: int) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", str(ROOT / "launch" / "instruct.py")]
    command += ["--config", str(config), f"run.name={name}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return config.parent / "runs" / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a config, and what one process left."""
    config = write_head_config(tmp_path_factory.mktemp("ranks"), train={"learning_rate": 0.003})
    return config, start(config, "alone", ranks=1)


def weights_of(run: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(run / "server" / f"round-{number:04d}" / "adapter" / FILE)


FILE = "adapter_model.safetensors"


SLOW = pytest.mark.slow
SETTINGS = [pytest.param("none", marks=SLOW), pytest.param("zero2", marks=SLOW), "zero3"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_ranks_train_one_head(settings: str, alone: tuple[Path, Path]) -> None:
    config, expected = alone
    how = [] if settings == "none" else [f"engine.deepspeed={settings}"]
    run = start(config, settings, *how, ranks=2)
    first, theirs = weights_of(run, 0), weights_of(expected, 0)
    assert all(torch.equal(first[name], theirs[name]) for name in theirs), "one draw for all"
    assert sum("classifier" in name for name in first) == 4
    last, theirs = weights_of(run, 2), weights_of(expected, 2)
    for name, weight in theirs.items():
        torch.testing.assert_close(last[name], weight, rtol=0, atol=2e-4)
        if "classifier" in name:
            assert not torch.equal(weight, first[name]), name
    mine, others = (
        json.loads((x / "evaluations/round-0000/results.json").read_text())["results"]["classify"]
        for x in (run, expected)
    )
    assert mine == pytest.approx(others), "ranks deal out the rows, and each is scored once"
