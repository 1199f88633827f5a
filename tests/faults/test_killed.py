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
from tiny import make_llama

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


def configure(model: Path, folder: Path) -> Path:
    data = {"fedex_word_problems": str(folder / "heldout.jsonl")}
    evaluation = {"tasks": list(data), "data": data, "limit": 2, "batch_size": 2}
    return write_config(model, folder, aggregate={"fold": "carry"}, evaluation=evaluation)


def test_plain(tiny_llama: Path, tmp_path: Path) -> None:
    kills = kill(configure(tiny_llama, tmp_path), "3", "0", "0", "model.dtype=bfloat16")
    assert len({one["kind"] for one in kills}) == 3
    assert all(one["killed"] and one["same"] for one in kills), kills


def test_one_of_two_ranks_under_zero3_with_offload(tiny_llama: Path, tmp_path: Path) -> None:
    kill_one_of_two("zero3_offload", tiny_llama, tmp_path)


@pytest.mark.slow  # DeepSpeed compiles its AIO op first
def test_one_of_two_ranks_under_zero3_with_nvme(tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    # Shards below 1 MiB stay in memory.
    wide = make_llama(tmp_path / "llama", width=768, inner=1536)
    kill_one_of_two("zero3_nvme", wide, tmp_path, f"engine.nvme_path={nvme}")
    assert any(file.stat().st_size > 2**20 for file in nvme.rglob("*.swp"))


def kill_one_of_two(settings: str, model: Path, folder: Path, *overrides: str) -> None:
    """Train, fold, score, checkpoint and resume with weights that are offloaded."""
    file = f"engine.deepspeed={ROOT / 'ds_configs' / settings}.json"
    (one,) = kill(configure(model, folder), "1", "1", "2", file, *overrides)
    assert one["killed"], one
    assert one["same"], one
    assert one["orphans"] == 0
