"""Where base weights live, behind one verb: add low-rank rows to what is stored here.

A fold adds the sum of U V over its pieces, in float32, to a stored matrix. Storage is a flat
slice of a row-major (P, Q) matrix: the whole of a plain parameter, or this rank's shard under
ZeRO-3, which may begin and end inside a row. Rows are computed in the same blocks whatever the
slice, aligned to the whole matrix, so that a sharded fold gives the same bits as an unsharded
one: a rank computes at most two partial blocks too many, and no weight is gathered or sent.

Legend: P, Q stored rows and columns; (P, Q) is (O, I) for nn.Linear and (I, O) for GPT-2's Conv1D.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedex_scale.algebra import LowRank

BLOCK_ROWS = 128
"""Rows computed at once; small enough to stay in a CPU's cache from the product to the sum."""
WIDE_BLOCK_ENTRIES = 2**25
"""Entries computed at once where the pieces come as a stream, which every block reads anew."""


@dataclass(kw_only=True)
class Target:
    """One stored matrix that can take a fold.

    Fields:
        flat: the elements stored here, a flat view; written in place.
        shape: (P, Q) of the whole matrix.
        start: index of `flat[0]` in the flattened whole.
        transposed: stored as (I, O) and not as (O, I).
        carry: what rounding has kept out so far, float32, like `flat`; None before the first fold.
    """

    flat: Tensor
    shape: tuple[int, int]
    start: int = 0
    transposed: bool = False
    carry: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return self.flat.numel() == self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class FoldStats:
    """Sums of squares over the elements stored here: what was to be added, and what was missed."""

    intended: float = 0.0
    missed: float = 0.0


@torch.no_grad()
def fold(target: Target, pieces: Iterable[LowRank], *, carry: bool) -> FoldStats:
    """Add sum_j U_j V_j to the stored matrix, in place.

    Args:
        pieces: U (O, P_j) and V (P_j, I), float32, on the device of `target.flat`; a sequence, or
            a stream that can be iterated again and again.
        carry: keep what rounding to the stored dtype loses, and add it at the next fold (error
            feedback), so that it never adds up. Without, it is lost.

    Returns:
        The squared norms of the intended change (without earlier carry) and of the difference
        between it and the change that the stored matrix made.
    """
    if not pieces:
        return FoldStats()
    rows, columns = target.shape
    streamed = not isinstance(pieces, Sequence)
    step = max(1, WIDE_BLOCK_ENTRIES // columns) if streamed else BLOCK_ROWS
    end = target.start + target.flat.numel()
    if carry and target.carry is None and target.flat.dtype != torch.float32:
        target.carry = torch.zeros_like(target.flat, dtype=torch.float32)
    intended = missed = 0.0
    buffer = target.flat.new_empty(min(step, rows), columns, dtype=torch.float32)
    for row in range(target.start // columns // step * step, -(-end // columns), step):
        delta = _rows(pieces, slice(row, min(row + step, rows)), target.transposed, buffer)
        offset = row * columns - target.start
        low, high = max(0, -offset), min(delta.numel(), end - row * columns)
        delta = delta.view(-1)[low:high]
        place = slice(offset + low, offset + high)
        intended += float(torch.linalg.vector_norm(delta)) ** 2
        kept_back = target.carry[place] if carry and target.carry is not None else None
        error = _add(target.flat[place], delta, kept_back)
        missed += float(torch.linalg.vector_norm(error)) ** 2
    return FoldStats(intended, missed)


def _rows(pieces: Iterable[LowRank], rows: slice, transposed: bool, buffer: Tensor) -> Tensor:
    """Return the given stored rows of the pieces' sum, in `buffer`."""
    out = buffer[: rows.stop - rows.start].zero_()
    for piece in pieces:
        if transposed:
            out.addmm_(piece.V_PI[:, rows].T, piece.U_OP.T)
        else:
            out.addmm_(piece.U_OP[rows], piece.V_PI)
    return out


def _add(here: Tensor, delta: Tensor, carry: Tensor | None) -> Tensor:
    """Add `delta` and the carry to `here`, update the carry, and return the part of delta missed."""
    if here.dtype == torch.float32:
        before = here.clone()
        here += delta
        return before.sub_(here).add_(delta)
    wanted = delta + here
    if carry is not None:
        wanted += carry
    here.copy_(wanted)
    left = wanted.sub_(here)
    if carry is None:
        return left
    missed = left - carry
    carry.copy_(left)
    return missed
