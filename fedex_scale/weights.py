"""Where base weights live, behind one verb: add low-rank rows to what is stored here.

A fold adds the sum of U V over its pieces, in float32, to a stored matrix. Storage is a flat
slice of a row-major (P, Q) matrix: the whole of a plain parameter, or this rank's shard under
ZeRO-3, which may begin and end inside a row. Rows are computed in the same blocks whatever the
slice, aligned to the whole matrix, so that a sharded fold gives the same bits as an unsharded
one: a rank computes at most two partial blocks too many, and no weight is gathered or sent.

Legend: P, Q stored rows and columns; (P, Q) is (O, I) for nn.Linear and (I, O) for GPT-2's Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from fedex_scale.algebra import LowRank

BLOCK_ENTRIES = 2**21
"""Entries of the product computed at once; enough for a matrix product to run at full speed."""
PART_ENTRIES = 2**19
"""Entries added at once; few enough to stay in a CPU's cache from the first step to the last."""
WIDE_BLOCK_ENTRIES = 2**23
"""Entries computed at once where the pieces come as a stream, which every block reads anew."""


@dataclass(kw_only=True)
class Target:
    """One stored matrix that can take a fold.

    Fields:
        shape: (P, Q) of the whole matrix.
        flat: the elements stored here, a flat view, which a fold writes to.
        lend: instead of `flat`, for storage that is not in memory: a context manager that gives
            the elements and puts them back.
        numel: how many elements are stored here.
        start: index of the first of them in the flattened whole.
        device: where to compute.
        transposed: stored as (I, O) and not as (O, I).
        carries: whether anything can be kept for a next fold.
        carry: what rounding has kept out so far, float32, like `flat`; None before the first fold.
    """

    shape: tuple[int, int]
    flat: InitVar[Tensor | None] = None
    lend: Callable[[], AbstractContextManager[Tensor]] | None = None
    numel: int = 0
    start: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    transposed: bool = False
    carries: bool = True
    carry: Tensor | None = None

    def __post_init__(self, flat: Tensor | None) -> None:
        if flat is not None:
            self.lend = lambda: nullcontext(flat)
            self.numel, self.device = flat.numel(), flat.device

    @property
    def is_whole(self) -> bool:
        return self.numel == self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class FoldStats:
    """Sums of squares over the elements stored here: what was to be added, and what was missed."""

    intended: float = 0.0
    missed: float = 0.0


@torch.no_grad()
def fold(target: Target, pieces: Iterable[LowRank], *, carry: bool) -> FoldStats:
    """Add sum_j U_j V_j to the stored matrix, in place.

    Args:
        pieces: U (O, P_j) and V (P_j, I), float32, on `target.device`; a sequence, or
            a stream that can be iterated again and again.
        carry: keep what rounding to the stored dtype loses, and add it at the next fold (error
            feedback), so that it never adds up. Without, it is lost.

    Returns:
        The squared norms of the intended change (without earlier carry) and of the difference
        between it and the change that the stored matrix made.
    """
    if not pieces or not target.numel:
        return FoldStats()
    with target.lend() as flat:
        return _fold(target, flat, pieces, carry)


def _fold(target: Target, flat: Tensor, pieces: Iterable[LowRank], carry: bool) -> FoldStats:
    rows, columns = target.shape
    streamed = not isinstance(pieces, Sequence)
    step = max(1, (WIDE_BLOCK_ENTRIES if streamed else BLOCK_ENTRIES) // columns)
    end = target.start + target.numel
    carry = carry and target.carries and flat.dtype != torch.float32
    if carry and target.carry is None:
        target.carry = torch.zeros_like(flat, dtype=torch.float32)
    intended = missed = 0.0
    buffer = flat.new_empty(min(step, rows), columns, dtype=torch.float32)
    scratch = flat.new_empty(2, min(PART_ENTRIES, buffer.numel()), dtype=torch.float32)
    for row in range(target.start // columns // step * step, -(-end // columns), step):
        delta = _rows(pieces, slice(row, min(row + step, rows)), target.transposed, buffer)
        offset = row * columns - target.start
        low, high = max(0, -offset), min(delta.numel(), end - row * columns)
        for first in range(low, high, PART_ENTRIES):
            part = delta.view(-1)[first : min(first + PART_ENTRIES, high)]
            place = slice(offset + first, offset + first + part.numel())
            error = _add(
                flat[place], part, target.carry[place] if carry else None, scratch[:, : len(part)]
            )
            intended += float(torch.dot(part, part))
            missed += float(torch.dot(error, error))
    return FoldStats(intended, missed)


def _rows(pieces: Iterable[LowRank], rows: slice, transposed: bool, buffer: Tensor) -> Tensor:
    """Return the given stored rows of the pieces' sum, in `buffer`."""
    out, beta = buffer[: rows.stop - rows.start], 0  # 0: what was there is dropped
    for piece in pieces:
        left, right = piece.U_OP[rows], piece.V_PI
        if transposed:
            left, right = piece.V_PI[:, rows].T, piece.U_OP.T
        torch.addmm(out, left, right, beta=beta, out=out)
        beta = 1
        del piece, left, right  # only then does a stream have one piece in memory
    return out


def _add(here: Tensor, delta: Tensor, carry: Tensor | None, scratch: Tensor) -> Tensor:
    """Add `delta` and the carry to `here`, update the carry, and return what delta missed.

    The change of a stored number is exact in float32, and so is a float32 sum less the 16-bit
    number that it is rounded to; but the sum itself has float32's rounding at the size of a weight.
    Where that would count, in a carry and in a float32 weight, delta is taken from the change.

    Args:
        scratch: float32 memory to work in, two rows as long as the others.
    """
    before, after = scratch
    if carry is None and here.dtype != torch.float32:
        here.copy_(after.copy_(here).add_(delta))
        return after.sub_(before.copy_(here))
    wanted = delta if carry is None else carry.add_(delta)
    before.copy_(here)
    here.copy_(torch.add(before, wanted, out=after))
    minus_change = before.sub_(after.copy_(here))
    if carry is not None:
        carry += minus_change
    return minus_change.add_(delta)
