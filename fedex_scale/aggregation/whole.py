"""The mean of weights that clients train whole, such as a head: part by part, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedex_scale.aggregation.outliers import Likeness
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.tensorfile import BLOCK_BYTES, Entry
from fedex_scale.methods.algebra import all_finite
from fedex_scale.runtime.errors import UserError


def mean_blocks(
    clients: Sequence[Adapter], weights: Sequence[float], name: str, likeness: Likeness
) -> Iterator[Tensor]:
    """Yield the clients' weighted mean of a whole weight, part by part.

    Args:
        weights: one a client, summing to 1.
        name: of the weight in the clients' files.
        likeness: takes each part.

    Raises:
        UserError: a client's is not finite.
    """
    entry = clients[0].file.entries[name]
    for span in spans(entry):
        mean = torch.zeros(span[1] - span[0], dtype=torch.float64)
        likeness.add_whole(_added(clients, weights, name, span, mean))
        yield mean if entry.dtype.is_floating_point else mean.round_()


def _added(
    clients: Sequence[Adapter],
    weights: Sequence[float],
    name: str,
    span: tuple[int, int],
    mean: Tensor,
) -> Iterator[Tensor]:
    """Yield each client's part, once it is in the mean."""
    for adapter, weight in zip(clients, weights, strict=True):
        part = adapter.full_block(name, span)
        if not all_finite(part):
            raise UserError(
                f"{adapter.path}, {name}: expected finite numbers, got NaN or Inf; "
                "leave this client out"
            )
        mean.add_(part, alpha=weight)
        yield part


def spans(entry: Entry) -> Iterator[tuple[int, int]]:
    """Yield the places of a weight's elements, from and to, a block of float64 at a time."""
    count, step = math.prod(entry.shape), BLOCK_BYTES // torch.float64.itemsize
    for start in range(0, count, step):
        yield start, min(start + step, count)
