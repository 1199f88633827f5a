"""A disk that really fills up, where a small file system can be mounted for the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from resuming import write_config

ROOT = Path(__file__).parents[2]


def test_a_run_survives_a_full_disk(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, tmp_path)
    script = str(Path(__file__).with_name("full_disk.py"))
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", sys.executable, script, str(config), "2"],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(seen) == 2
    assert all(x["stopped"] and x["lines"] == 1 and not x["traceback"] for x in seen), seen
    assert all(x["went_on"] and x["same"] for x in seen), seen
