"""kill -9 at any moment: the run goes on and ends bit-equal to one that was left alone.

benchmarks/reliability.py does the same at many more moments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resuming import write_config

KILLS = Path(__file__).with_name("kills.py")
ROOT = Path(__file__).parents[2]


def kill(config: Path, *arguments: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(KILLS), str(config), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_config(tiny_llama, tmp_path, aggregate={"fold": "carry"})


def test_plain(config: Path) -> None:
    kills = kill(config, "3", "0", "0", "model.dtype=bfloat16")
    assert len({one["kind"] for one in kills}) == 3
    assert all(one["killed"] and one["same"] for one in kills), kills


def test_one_of_two_ranks_under_zero3(config: Path) -> None:
    zero3 = f"engine.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
    (one,) = kill(config, "1", "1", "2", zero3)
    assert one["killed"], one
    assert one["same"], one
    assert one["orphans"] == 0
