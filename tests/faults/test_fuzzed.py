"""No file, however it was written, is more than one line of refusal to any command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from resuming import write_config

from fedex_scale.run import run_config

ROOT = Path(__file__).parents[2]
CASES, SECONDS = 100, 60


def test_every_command_survives_what_is_drawn(tiny_llama: Path, tmp_path: Path) -> None:
    data = {"fedex_word_problems": str(tmp_path / "heldout.jsonl")}
    evaluation = {"tasks": list(data), "data": data, "limit": 1, "batch_size": 1}
    sections = {"evaluation": evaluation, "partition": {"num_clients": 2}}
    config = write_config(tiny_llama, tmp_path, federation={"rounds": 1}, **sections)
    run_config(config, ["run.name=source"])
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    arguments = [tiny_llama, tmp_path / "runs" / "source", folder, CASES, 0, SECONDS]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fuzz.py")), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert seen
    assert [x for x in seen if fell_short(x)] == []


def fell_short(seen: dict) -> bool:
    kept = ("output_left", "not_finite", "writes_elsewhere", "controls", "too_much_memory")
    return seen["outcome"] not in ("accepted", "refused") or any(seen[name] for name in kept)
