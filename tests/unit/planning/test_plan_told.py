"""What README says fits where is what `fedex-scale plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedex_scale.config.load import load_config
from fedex_scale.config.section import replace
from fedex_scale.planning.choice import Sizes
from fedex_scale.planning.machine import Machine

README = Path(__file__).parents[3] / "README.md"
RECIPES = {
    "Mistral-7B": "mistral_7b_metamath",
    "Gemma-2 9B": "gemma2_9b_metamath",
    "Llama-3.2 3B": "llama32_3b_commonsense",
}
GB = 10**9


@pytest.mark.parametrize("model", RECIPES)
def test_readmes_row_is_the_plans(model: str) -> None:
    (row,) = re.findall(
        rf"^\| {re.escape(model)}, (.*) \|$", README.read_text("utf-8"), re.MULTILINE
    )
    _, *needs, small, middle, large = [cell.strip() for cell in row.split("|")]
    config = load_config(RECIPES[model], [])
    least = replace(config.train, micro_batch_tokens=config.data.max_length)
    sizes = Sizes(config, Machine(gpu_memory=24 * GB, host_memory=128 * GB))
    for file, told in zip((None, "zero3_offload"), needs, strict=True):
        engine = replace(config.engine, deepspeed=file)
        estimate = sizes.estimate(replace(config, engine=engine, train=least))
        assert estimate.fits
        assert told == f"{estimate.total('gpu') / GB:.1f}, {estimate.total('host') / GB:.1f}"
    for memory, told in ((24, small), (48, middle), (80, large)):
        sizes.machine = Machine(gpu_memory=memory * GB, host_memory=128 * GB)
        tokens = sizes.filled(config).train.micro_batch_tokens
        assert told == f"{tokens // config.data.max_length}"
