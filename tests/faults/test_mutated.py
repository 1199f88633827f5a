"""Damaged and hostile files are refused on one line: no traceback, no hang, no output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from resuming import write_config

from fedex_scale.run import run_config

ROOT = Path(__file__).parents[2]


def test_every_reader_survives_damaged_files(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, tmp_path)
    run_config(config, ["run.name=source", "federation.rounds=1"])
    folder = tmp_path / "mutated"
    folder.mkdir()
    run = tmp_path / "runs" / "source"
    arguments = [tiny_llama, run, folder, 14, 0]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mutate.py")), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(seen) == 42
    bad = [
        x
        for x in seen
        if x["outcome"].startswith("failed") or x["output_left"] or x["too_much_memory"]
    ]
    assert not bad, (bad, done.stderr[-3000:])
    assert sum(x["outcome"] == "refused" for x in seen) > 25
