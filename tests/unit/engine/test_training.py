"""What an optimizer holds between two rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import build

from fedex_scale.config.learning import LoraSection
from fedex_scale.engine.contents import read_pairs
from fedex_scale.engine.training import moments_away, reset_for_client, train_step

BATCH = {"input_ids": torch.arange(5, 45)[None], "labels": torch.arange(5, 45)[None]}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "sgd"])
def test_no_memory_is_held_for_moments_while_a_model_is_scored(
    tiny_llama: Path, optimizer: str
) -> None:
    engine = build(tiny_llama, lora=LoraSection(rank=8, alpha=8), optimizer=optimizer)
    start = dict(read_pairs(engine))

    def client() -> list[torch.Tensor]:
        reset_for_client(engine, start.__getitem__, side=False)
        for step in range(3):
            train_step(engine, [BATCH], units=39, lr=0.01 * (step + 1))
        return [x for _, pair in read_pairs(engine) for x in pair]

    first = client()
    moments = [
        value
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and not name.startswith("qmap")
    ]
    assert bool(moments) == (optimizer != "sgd")
    sizes = [moment.untyped_storage().nbytes() for moment in moments]
    with moments_away(engine):
        assert not any(moment.untyped_storage().nbytes() for moment in moments)
        engine.model.eval()
    assert [moment.untyped_storage().nbytes() for moment in moments] == sizes
    assert not any(moment.any() for moment in moments)
    assert all(torch.equal(*both) for both in zip(first, client(), strict=True))
