"""No operation mixes devices: the checks of tests/gpu/fake_gpu_checks.py, in a process apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_nothing_mixes_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / "gpu" / "fake_gpu_checks.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
