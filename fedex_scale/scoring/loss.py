"""The loss on held-out examples, of each client and pooled, on the running engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fedex_scale.data.batching import shard
from fedex_scale.runtime import distributed
from fedex_scale.tasks.interface import Examples

MAX_EXPONENT = 700.0  # exp of more is beyond a float


def held_out_loss(
    model: nn.Module,
    parts: Mapping[str, Examples],
    *,
    micro_batch_size: int,
) -> dict[str, Any]:
    """Return the mean loss over all trained tokens, its perplexity, and each part's loss.

    Every rank must take part, and gets the same; each example is looked at on one rank. Nothing
    random happens, and the next training step sets the mode that it needs.

    Args:
        parts: held-out examples, at least one each, by the name of who has them.
    """
    model.eval()
    sums = [_sum(model, part, micro_batch_size) for part in parts.values()]
    losses = distributed.sum_over_ranks(*sums)
    tokens = [int(part.units.sum()) for part in parts.values()]
    loss = sum(losses) / sum(tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MAX_EXPONENT)),
        "examples": sum(map(len, parts.values())),
        "tokens": sum(tokens),
        "clients": {
            name: total / count for name, total, count in zip(parts, losses, tokens, strict=True)
        },
    }


@torch.no_grad()
def _sum(model: nn.Module, part: Examples, micro_batch_size: int) -> float:
    """Return this rank's share of the sum of losses, of batches of like lengths."""
    order = np.argsort(-part.lengths, kind="stable").tolist()
    batches = shard(
        order,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        micro_batch_size=micro_batch_size,
    )
    total = torch.zeros((), dtype=torch.float64, device=distributed.device())
    for indices in batches:  # as many on every rank, as those that hold the model together must
        batch = part.batch(indices, fallback=order[-1])
        batch = {name: tensor.to(total.device) for name, tensor in batch.items()}
        total += model(**batch, use_cache=False, num_items_in_batch=1).loss
    return float(total)
