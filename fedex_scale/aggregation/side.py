"""Grow the side adapter: what the forward pass sees, beside the base, of all rounds' residuals.

A round's residual takes columns of its own, and those of earlier rounds stay as they are. To
compress the sum anew each round would cost more time from round to round, would save little (the
sum of six rounds needs 85% of its columns to lose a thousandth of the last one), and would round
all that went before once more, which in bfloat16 can lose more than a later round's residual has.

Nothing is lost for good: the server keeps every round's residual. Where columns run out, the best
part of the exact sum of all rounds is taken, so that what a cap kept out is offered again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from fedex_scale.methods.algebra import (
    LowRank,
    Pieces,
    compress,
    compress_pieces,
    inner,
    norm,
    norm_of_sum,
    round_factors,
    stack,
    truncate,
)

WORTH_A_TRY = 0.01
"""Tolerance from which on the sum is tried to shrink. Below it needs nearly all columns, and trying
would cost more from round to round."""


class Past(NamedTuple):
    """What earlier rounds left of one layer.

    Fields:
        residuals: every round's, exact; can be iterated again and again.
        seen: the parts of the side adapter, as the forward pass holds them.
        sum_norm: of the residuals' sum.
        unseen_norm: of the part of that sum that the forward pass does not see.
    """

    residuals: Iterable[LowRank] = ()
    seen: Sequence[LowRank] = ()
    sum_norm: float = 0.0
    unseen_norm: float = 0.0

    @property
    def num_columns(self) -> int:
        return sum(part.V_PI.shape[0] for part in self.seen)

    def sum_norm_with(self, update: Iterable[LowRank]) -> float:
        """Return the norm of the sum of all residuals and one more."""
        if not isinstance(update, Sequence):
            return norm_of_sum(Pieces(lambda: chain(self.residuals, update)))
        new = stack(*update)
        cross = sum(inner(residual, new) for residual in self.residuals)
        return _root(self.sum_norm**2 + 2 * cross + norm(new) ** 2)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What becomes of one layer's side adapter.

    Fields:
        part: new columns, as the forward pass will hold them, float32.
        whole: they take the place of all earlier ones.
        capped: there is more than the columns hold.
        missed_norm: of the part of this round's residual that the forward pass does not see.
        sum_norm, unseen_norm: as in `Past`, with this round.
    """

    part: LowRank
    whole: bool
    missed_norm: float
    sum_norm: float
    unseen_norm: float
    capped: bool = False


def grow(
    update: Iterable[LowRank], past: Past, *, max_rank: int, tolerance: float, dtype: torch.dtype
) -> Growth:
    """Return the columns that let the forward pass see a round's residual as well.

    Args:
        update: the residual's pieces; a sequence, or a stream of many.
        max_rank: columns that the side adapter may have.
        tolerance: share of the residual's norm that may be left out to save columns.
        dtype: in which the forward pass holds them.
    """
    if not isinstance(update, Sequence):
        return _best_of_many(update, past, max_rank, tolerance, dtype)
    new = stack(*update)
    new_norm = norm(new)
    if new_norm == 0:
        return _unchanged(new, past)
    needed = truncate(new, tolerance * new_norm)
    rank = needed.V_PI.shape[0]
    appended = None
    if past.num_columns + rank <= max_rank:
        appended = _appended(new, round_factors(needed, dtype), past)
        if not past.seen or tolerance < WORTH_A_TRY:
            return appended
    exact = stack(*past.residuals, new)
    best = truncate(exact, tolerance * new_norm)
    if appended and best.V_PI.shape[0] >= past.num_columns + rank:
        return appended
    capped = best.V_PI.shape[0] > max_rank
    best = LowRank(best.U_OP[:, :max_rank], best.V_PI[:max_rank])
    replaced = _replaced(exact, new, round_factors(best, dtype), past, capped=capped)
    if appended and replaced.missed_norm > 2 * appended.missed_norm:
        return appended
    return replaced


def _unchanged(new: LowRank, past: Past) -> Growth:
    nothing = LowRank(new.U_OP[:, :0], new.V_PI[:0])
    return Growth(
        part=nothing,
        whole=False,
        missed_norm=0.0,
        sum_norm=past.sum_norm,
        unseen_norm=past.unseen_norm,
    )


def _appended(new: LowRank, part: LowRank, past: Past) -> Growth:
    """Tell what new columns achieve; the norms grow by inner products, without the whole sum."""
    lost, with_sum, with_unseen = stack(new, _minus(part)), 0.0, 0.0
    if residuals := list(past.residuals):
        with_sum = inner(stack(*residuals), new)
        with_unseen = inner(stack(*residuals, *map(_minus, past.seen)), lost)
    missed = norm(lost)
    return Growth(
        part=part,
        whole=False,
        missed_norm=missed,
        sum_norm=_root(past.sum_norm**2 + 2 * with_sum + norm(new) ** 2),
        unseen_norm=_root(past.unseen_norm**2 + 2 * with_unseen + missed**2),
    )


def _replaced(exact: LowRank, new: LowRank, part: LowRank, past: Past, *, capped: bool) -> Growth:
    return Growth(
        part=part,
        whole=True,
        missed_norm=norm(stack(new, *past.seen, _minus(part))),
        sum_norm=norm(exact),
        unseen_norm=norm(stack(exact, _minus(part))),
        capped=capped,
    )


def _best_of_many(
    update: Iterable[LowRank], past: Past, max_rank: int, tolerance: float, dtype: torch.dtype
) -> Growth:
    """Take a nearly best part of all rounds' pieces, a few of which are in memory at a time."""
    new_norm = norm_of_sum(update)
    if new_norm == 0:
        return _unchanged(next(iter(update)), past)
    exact = Pieces(lambda: chain(past.residuals, update))
    best = truncate(compress_pieces(exact, max_rank, nearly=True)[0], tolerance * new_norm)
    part = round_factors(best, dtype)
    change = [*past.seen, _minus(part)]
    return Growth(
        part=part,
        whole=True,
        missed_norm=norm_of_sum(Pieces(lambda: chain(update, change))),
        sum_norm=norm_of_sum(exact),
        unseen_norm=norm_of_sum(Pieces(lambda: chain(exact, [_minus(part)]))),
        capped=part.V_PI.shape[0] == max_rank,
    )


def split(
    update: Iterable[LowRank], rank: int, dtype: torch.dtype
) -> tuple[LowRank, float, float, Iterable[LowRank]]:
    """Split a single round's update into the best part of a rank, and the rest, for the base.

    Of many pieces the part is nearly the best, as nothing is lost by it.

    Returns:
        The part; what the forward pass misses of it, as it rounds to `dtype`; of many pieces how
        much of the update's squared norm is not in the rest's; the rest.
    """
    if isinstance(update, Sequence):
        kept, rest = compress(stack(*update), rank)
        in_side, overflow = 0.0, [rest] if rest.U_OP.any() else []
    else:
        kept, overflow = compress_pieces(update, rank, nearly=True)
        in_side = norm(kept) ** 2  # a projection of the update: orthogonal to the rest
    missed = norm(stack(round_factors(kept, dtype), _minus(kept)))
    return kept, missed, in_side, overflow


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))  # a square that cancels may come out below zero


def _minus(x: LowRank) -> LowRank:
    return LowRank(-x.U_OP, x.V_PI)
