"""No operation mixes devices, and the first day's tests work: files of tests/gpu, run apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_apart

GPU = Path(__file__).parents[1] / "gpu"


@pytest.mark.slow
def test_the_first_day_on_a_card_works_without_one() -> None:
    """Every test of tests/gpu that does not ask for a card's own figures, on this machine."""
    run_apart(GPU / "test_first_day.py", FEDEX_SCALE_TRY="1")


def test_nothing_mixes_devices() -> None:
    run_apart(GPU / "fake_gpu_checks.py")
