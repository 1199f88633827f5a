"""Where base weights live, behind one verb: add low-rank rows to what is stored here.

A fold adds the sum of U V over its pieces, in float32, to a stored matrix. Storage is a flat
slice of a row-major (P, Q) matrix: the whole of a plain parameter, or this rank's shard under
ZeRO-3, which may begin and end inside a row. The sum is computed in the same blocks whatever the
slice, aligned to the whole matrix, so that a sharded fold gives the same bits as an unsharded
one: a rank computes a part of at most two rows of blocks too many, and no weight is gathered or
sent.

Legend: P, Q stored rows and columns; (P, Q) is (O, I) for nn.Linear and (I, O) for GPT-2's Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import InitVar, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fedex_scale.aggregation import fold_kernel
from fedex_scale.methods.algebra import LowRank, norm_of_sum, square_norm, stack

BLOCK_SIDES = {"cpu": 2**10, "cuda": 2**12}
"""Rows and columns computed at once. CPU: enough for a matrix product at full speed, and few enough
to stay in the cache from the first step to the last. GPU: enough that launches cost little."""
STREAMED_ENTRIES = 2**22
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
        writable: whether it takes a fold at all; a quantized weight does not, and misses it whole.
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
    writable: bool = True
    carry: Tensor | None = None

    def __post_init__(self, flat: Tensor | None) -> None:
        if flat is not None:
            self.lend = lambda: nullcontext(flat)
            self.numel, self.device = flat.numel(), flat.device

    @property
    def share(self) -> float:
        """Of the whole matrix, what is stored here."""
        return self.numel / math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.numel == self.shape[0] * self.shape[1]


class FoldStats(NamedTuple):
    """Squared norms: what was to be added, and what was missed, of the elements stored here.

    Where the pieces are few, `intended` may be the whole matrix's, times the share that is stored.
    `unseen` is what of all folds so far the stored matrix lacks, if a carry was kept (`carried`).
    """

    intended: float = 0.0
    missed: float = 0.0
    unseen: float = 0.0
    carried: bool = False


def as_stats(*found: Tensor) -> list[FoldStats]:
    """Return what folds found as numbers: the one time that all of them wait for their device."""
    rows = torch.stack(found).cpu().tolist() if found else []
    return [FoldStats(*numbers, bool(carried)) for *numbers, carried in rows]


@torch.no_grad()
def fold(
    target: Target, pieces: Iterable[LowRank], *, carry: bool, use_kernel: bool = True
) -> Tensor:
    """Add sum_j U_j V_j to the stored matrix, in place.

    Nothing here waits for the device, unless the pieces are a stream or nothing can be written.

    Args:
        pieces: U (O, P_j) and V (P_j, I), float32, on `target.device`; a sequence, or
            a stream that can be iterated again and again.
        carry: keep what rounding to the stored dtype loses, and add it at the next fold (error
            feedback), so that it never adds up. Without, it is lost.
        use_kernel: fold a 16-bit weight in one pass, where its GPU can (`fold_kernel`).

    Returns:
        What `as_stats` makes a FoldStats of, float64, on the device: the squared norms of the
        intended change (without earlier carry), of the difference between it and the change that
        the stored matrix made, of the carry, and whether there is one.
    """
    nothing = torch.zeros((), dtype=torch.float64, device=target.device)
    if not pieces or not target.numel:
        return torch.stack([nothing] * 4)
    few = isinstance(pieces, Sequence)
    if not target.writable:
        whole = square_norm(stack(*pieces)) if few else nothing + norm_of_sum(pieces) ** 2
        intended = whole * target.share
        return torch.stack([intended, intended, nothing, nothing])
    with target.lend() as flat:
        carry = carry and target.carries and flat.dtype != torch.float32
        if carry and target.carry is None:
            target.carry = torch.zeros_like(flat, dtype=torch.float32)
        if use_kernel and few and fold_kernel.can_fold(flat):
            sums = fold_kernel.fold_into(
                flat,
                pieces,
                target.carry if carry else None,
                shape=target.shape,
                start=target.start,
                transposed=target.transposed,
            )
        else:
            intended = square_norm(stack(*pieces)) * target.share if few else nothing
            if few and not carry and flat.dtype != torch.float32:
                sums = torch.stack([intended, _fold_into(target, flat, pieces), nothing])
            else:
                sums = _fold_beside(target, flat, pieces, carry, intended)
    return torch.cat([sums, nothing.add(carry).view(1)])


def _fold_into(target: Target, flat: Tensor, pieces: Sequence[LowRank]) -> Tensor:
    """Let the matrix product itself add to the weight: the fewest passes over memory."""
    height, width = _block_shape(target, pieces)
    memory = flat.new_empty(height * width, dtype=torch.float32)
    missed = torch.zeros((), dtype=torch.float64, device=flat.device)
    for block, parts in _blocks(target, height, width):
        sum_PQ = memory[: block.numel].view(block.shape)
        for place, common in parts:
            sum_PQ[_within(common, block)] = _view(flat, place)[_within(common, place)]
        _add_product(pieces, block, target.transposed, sum_PQ, beta=1)
        for place, common in parts:
            here, wanted = (
                _view(flat, place)[_within(common, place)],
                sum_PQ[_within(common, block)],
            )
            here.copy_(wanted)
            missed += _square(wanted.sub_(here))
    return missed


def _fold_beside(
    target: Target, flat: Tensor, pieces: Iterable[LowRank], carry: bool, intended: Tensor
) -> Tensor:
    """Make the sum of the pieces apart, and add it: for a carry, a float32 weight, and streams."""
    height, width = _block_shape(target, pieces)
    memory = flat.new_empty(height * width, dtype=torch.float32)
    at_once = min(height * width, max(width, _side(target) ** 2))
    scratch = flat.new_empty(2, at_once, dtype=torch.float32)
    sums = torch.zeros(3, dtype=torch.float64, device=flat.device)
    for block, parts in _blocks(target, height, width):
        sum_PQ = memory[: block.numel].view(block.shape)
        _add_product(pieces, block, target.transposed, sum_PQ, beta=0)
        for place, common in (piece for part in parts for piece in _cut(*part, at_once)):
            delta = sum_PQ[_within(common, block)]
            kept_out = _view(target.carry, place)[_within(common, place)] if carry else None
            error = _add(
                _view(flat, place)[_within(common, place)],
                delta,
                kept_out,
                scratch[:, : delta.numel()].view(2, *delta.shape),
            )
            found = [_square(x) for x in (delta, error, kept_out) if x is not None]
            sums[: len(found)] += torch.stack(found)
    sums[0] = torch.where(intended > 0, intended, sums[0])
    return sums


def _side(target: Target) -> int:
    return BLOCK_SIDES.get(target.device.type, BLOCK_SIDES["cpu"])


def _block_shape(target: Target, pieces: Iterable[LowRank]) -> tuple[int, int]:
    rows, columns = target.shape
    if not isinstance(pieces, Sequence):
        return min(rows, max(1, STREAMED_ENTRIES // columns)), columns
    return min(rows, _side(target)), min(columns, _side(target))


def _blocks(
    target: Target, height: int, width: int
) -> Iterator[tuple[Rectangle, list[tuple[Rectangle, Rectangle]]]]:
    """Yield the blocks of a matrix that are stored here, in reading order; some are smaller.

    With each come the stored rectangles that it overlaps, and the overlaps.
    """
    rows, columns = target.shape
    stored = list(_rectangles(target.start, target.numel, columns))
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            block = Rectangle(top, min(top + height, rows), left, min(left + width, columns))
            overlaps = [(place, _overlap(place, block)) for place in stored]
            parts = [(place, common) for place, common in overlaps if common]
            if parts:
                yield block, parts


def _cut(
    place: Rectangle, common: Rectangle, max_entries: int
) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Yield an overlap in pieces of whole rows that have at most so many entries."""
    rows = max(1, max_entries // common.shape[1])
    for top in range(common.top, common.bottom, rows):
        yield place, common._replace(top=top, bottom=min(top + rows, common.bottom))


def _rectangles(start: int, numel: int, columns: int) -> Iterator[Rectangle]:
    """Yield where a flat slice lies in its matrix: a row's end, whole rows, a row's begin."""
    end = start + numel
    while start < end:
        row, column = divmod(start, columns)
        if column or end - start < columns:
            stop = min(end, (row + 1) * columns)
            rectangle = Rectangle(row, row + 1, column, column + stop - start)
        else:
            stop = end // columns * columns
            rectangle = Rectangle(row, end // columns, 0, columns)
        yield rectangle._replace(at=numel - (end - start))
        start = stop


def _overlap(x: Rectangle, y: Rectangle) -> Rectangle | None:
    common = Rectangle(
        max(x.top, y.top), min(x.bottom, y.bottom), max(x.left, y.left), min(x.right, y.right)
    )
    return common if common.top < common.bottom and common.left < common.right else None


def _within(part: Rectangle, whole: Rectangle) -> tuple[slice, slice]:
    """Return the slices that cut `part` out of a matrix that holds `whole`."""
    return (
        slice(part.top - whole.top, part.bottom - whole.top),
        slice(part.left - whole.left, part.right - whole.left),
    )


def _view(flat: Tensor, place: Rectangle) -> Tensor:
    """Return the stored elements of a rectangle as a matrix."""
    return flat[place.at : place.at + place.numel].view(place.shape)


def _add_product(
    pieces: Iterable[LowRank], block: Rectangle, transposed: bool, out: Tensor, *, beta: int
) -> None:
    """Set `out` to beta times itself plus the given block of the pieces' sum."""
    rows, columns = slice(block.top, block.bottom), slice(block.left, block.right)
    for piece in pieces:
        left, right = piece.U_OP[rows], piece.V_PI[:, columns]
        if transposed:
            left, right = piece.V_PI[:, rows].T, piece.U_OP[columns].T
        torch.addmm(out, left, right, beta=beta, out=out)  # beta 0: what was there is dropped
        beta = 1
        del piece, left, right  # only then does a stream have one piece in memory


def _square(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.dot(flat, flat).double()


def _add(here: Tensor, delta: Tensor, carry: Tensor | None, scratch: Tensor) -> Tensor:
    """Add `delta` and the carry to `here`, update the carry, and return what delta missed.

    The change of a stored number is exact in float32, and so is a float32 sum less the 16-bit
    number that it is rounded to; but the sum itself has float32's rounding at the size of a weight.
    Where that would count, in a carry and in a float32 weight, delta is taken from the change.

    Args:
        scratch: float32 memory to work in, twice the others' shape.
    """
    before, after = scratch
    if carry is None and here.dtype != torch.float32:
        here.copy_(after.copy_(here).add_(delta))
        return after.sub_(here)
    wanted = delta if carry is None else carry.add_(delta)
    before.copy_(here)
    here.copy_(torch.add(before, wanted, out=after))
    minus_change = before.sub_(after.copy_(here))
    if carry is not None:
        carry += minus_change
    return minus_change.add_(delta)


class Rectangle(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of a matrix.

    Where it is stored, its elements begin at `at`, row after row.
    """

    top: int
    bottom: int
    left: int
    right: int
    at: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    @property
    def numel(self) -> int:
        return math.prod(self.shape)
