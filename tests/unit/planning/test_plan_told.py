"""What README says fits where is what `fedex-scale plan` says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedex_scale.config.load import load_config
from fedex_scale.config.section import replace
from fedex_scale.planning.choice import Sizes
from fedex_scale.planning.columns import Side
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


SHAPES = {"wide": (640, 512), "narrow": (96, 64)}


@pytest.mark.parametrize(
    ("most", "writable", "told", "not_told"),
    [
        (160, True, ["hold 2 of 4 rounds whole", "side_rank=320 holds all", "planes"], []),
        (160, False, ["side_rank=320 holds all"], ["planes"]),
        (320, True, ["grows to 240 columns", "planes"], ["hold"]),
        (512, True, ["planes"], ["hold"]),  # as many as the widest layer has at all
    ],
)
def test_what_rounds_cost_is_told(
    most: int, writable: bool, told: list[str], not_told: list[str]
) -> None:
    note = Side(each=80, most=most, rounds=4, writable=writable).note(SHAPES)
    assert note is not None
    assert all(x in note for x in told)
    assert not any(x in note for x in not_told)


def test_a_side_adapter_of_every_column_is_no_cap() -> None:
    note = Side(each=400, most=512, rounds=4, writable=True).note(SHAPES)
    assert note is not None
    assert "hold" not in note
