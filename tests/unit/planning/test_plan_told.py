"""What README says fits where is what `fedex-scale plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedex_scale import api

README = Path(__file__).parents[3] / "README.md"
RECIPES = {
    "Mistral-7B": "mistral_7b_metamath",
    "Gemma-2 9B": "gemma2_9b_metamath",
    "Llama-3.2 3B": "llama32_3b_commonsense",
}


@pytest.mark.parametrize("model", RECIPES)
def test_readmes_row_is_the_plans(model: str) -> None:
    (row,) = re.findall(
        rf"^\| {re.escape(model)}, (.*) \|$", README.read_text("utf-8"), re.MULTILINE
    )
    _, plain, offload, *verdicts = [cell.strip() for cell in row.split("|")]
    plan = api.plan(RECIPES[model], gpus=1, gpu_memory="24GB", host_memory="128GB")
    estimates = {x.name: x for x in (*plan.others, plan.chosen)}
    for name, told in (("none", plain), ("zero3_offload", offload)):
        needs = estimates[name].needs
        gpu, host = (sum(getattr(need, place) for need in needs) for place in ("gpu", "host"))
        assert told == f"{gpu / 1e9:.1f}, {host / 1e9:.1f}"
    assert plan.chosen.fits
    assert verdicts == ["fits"] * 3  # at 24 GB, and so at more
