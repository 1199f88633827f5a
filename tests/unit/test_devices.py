"""No operation mixes devices: the checks of tests/gpu/fake_gpu_checks.py, in a process apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_first_day_on_a_card_works_without_one() -> None:
    """Every test of tests/gpu that does not ask for a card's own figures, on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / "gpu" / "test_first_day.py")],
        env={**os.environ, "FEDEX_SCALE_TRY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_nothing_mixes_devices() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / "gpu" / "fake_gpu_checks.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
