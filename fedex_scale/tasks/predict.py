"""A model's outputs on held-out examples, whole batches dealt out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedex_scale.runtime import distributed
from fedex_scale.tasks.interface import Examples


def predictions(
    model: nn.Module,
    examples: Examples,
    outputs_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    batch_size: int,
) -> np.ndarray:
    """Return the outputs, (examples, ...) float32, on every rank; the same whatever the ranks."""
    batches = batches_of(examples.lengths, batch_size)
    device = distributed.device()

    def answer(batch: Sequence[int]) -> list[np.ndarray]:
        inputs = examples.batch(batch, fallback=batch[0])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return list(outputs_of(model, inputs).float().cpu().numpy())

    return np.stack(dealt(model, batches, answer))


def batches_of(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Return batches of like lengths, longest first, so that little is padded."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]


def dealt(
    model: nn.Module, batches: Sequence[list[int]], answer: Callable[[list[int]], list[Any]]
) -> list[Any]:
    """Return the answers to all examples, in their order, on every rank.

    Ranks that hold the model together go through all batches in step.
    """
    ranks = distributed.world_size()
    together = ranks == 1 or is_partitioned(model)
    mine = batches if together else batches[distributed.rank() :: ranks]
    with torch.no_grad():
        found = {i: x for batch in mine for i, x in zip(batch, answer(batch), strict=True)}
    if not together:
        shares: list[dict] = [{}] * ranks
        dist.all_gather_object(shares, found)
        found = {index: value for share in shares for index, value in share.items()}
    return [found[index] for index in range(sum(map(len, batches)))]


def is_partitioned(model: nn.Module) -> bool:
    """Tell whether a forward pass gathers weights from the other ranks."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
