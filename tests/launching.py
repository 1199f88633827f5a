"""A small run of the real program, and its start under a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from fedex_scale.data.word_problems import generate, write_jsonl

ROOT = Path(__file__).parents[1]


def write_tiny_config(model: Path, folder: Path) -> Path:
    """Write a config of two rounds on real word problems, scored before and after, and its data."""
    train, heldout = generate(0, train=30, heldout=4)
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(heldout, folder / "heldout.jsonl")
    config = {
        "run": {"name": "tiny", "dir": str(folder / "runs"), "overwrite": True},
        "model": {"path": str(model), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"path": str(folder / "train.jsonl"), "max_length": 512},
        "federation": {"rounds": 2},
        "train": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.001},
        "evaluation": {
            "tasks": ["fedex_word_problems"],
            "data": {"fedex_word_problems": str(folder / "heldout.jsonl")},
            "batch_size": 4,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(command: list[str], config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run launch/instruct.py under a launcher, as a user does."""
    program = [str(ROOT / "launch" / "instruct.py"), "--config", str(config), *overrides]
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    return subprocess.run(
        [*command, *program], capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT
    )


def run_apart(checks: Path, **environment: str) -> None:
    """Run a file of tests in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(checks)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def fedex_scale(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "fedex_scale.cli", *arguments)


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
