"""Linear algebra of low-rank matrices U V, without forming the product while it is the larger.

Factors are float32; everything in between is float64. Sums too wide to hold are `Pieces`.

Legend: O rows, I columns, P rank of a low-rank matrix, Q width of a basis: `U_OP`, `V_PI`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def stack(*parts: LowRank) -> LowRank:
    """Return the sum of low-rank matrices as one, their factors side by side."""
    return LowRank(
        torch.cat([part.U_OP for part in parts], dim=1),
        torch.cat([part.V_PI for part in parts], dim=0),
    )


def compress(x: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """Split x into its best approximation of the given rank (Eckart-Young) and the rest.

    Singular values fall, their square root goes to either side, and the largest entry of each
    left vector is positive. Those that are rounding noise become zero.

    Returns:
        The best part, with exactly `rank` columns (zeros fill up), and the rest, with
        max(0, min(O, I, P) - rank); float32. They sum to x.
    """
    left_OP, S_P, right_PI = _svd(x)
    root_P = S_P.sqrt()
    U_OP, V_PI = (left_OP * root_P).float(), (root_P[:, None] * right_PI).float()
    missing = max(0, rank - S_P.numel())
    best = LowRank(pad(U_OP[:, :rank], (0, missing)), pad(V_PI[:rank], (0, 0, 0, missing)))
    return best, LowRank(U_OP[:, rank:], V_PI[rank:])


def truncate(x: LowRank, loss: float) -> LowRank:
    """Return the approximation of x of the smallest rank whose error has at most the norm `loss`.

    Singular values that are rounding noise do not count; columns are as `compress` makes them.
    """
    left_OP, S_P, right_PI = _svd(x)
    tail_P = S_P.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = slice(int(tail_P.gt(loss).sum()))
    root_P = S_P[kept].sqrt()
    return LowRank((left_OP[:, kept] * root_P).float(), (root_P[:, None] * right_PI[kept]).float())


def round_factors(x: LowRank, dtype: torch.dtype) -> LowRank:
    """Return x as `dtype` holds its factors, in float32; bfloat16 loses some 0.2% of x.

    Refitting V to the rounded U gains nothing: what rounding adds to U lies outside of its columns.
    """
    return LowRank(*(factor.to(dtype).float() for factor in x))


def compress_pieces(
    pieces: Iterable[LowRank], rank: int, *, nearly: bool = False
) -> tuple[LowRank, Iterable[LowRank]]:
    """Split a sum of pieces as `compress` does, with one piece in memory at a time.

    A single piece is split by `compress`. Of more, the best part is found by subspace iteration,
    and the rest is the pieces less the best part, so that both sum to the pieces all the same.

    Args:
        pieces: at least one, and iterable again and again: `Pieces` or a list.
        nearly: of several pieces, take a part that is nearly the best, at a tenth of the cost.
    """
    only = _only(pieces)
    if only is not None:
        best, rest = compress(only, rank)
        return best, [rest]
    best = _leading_part(pieces, rank, nearly)
    return best, Pieces(lambda: chain(pieces, [LowRank(-best.U_OP, best.V_PI)]))


def inner(x: LowRank, y: LowRank) -> float:
    """Return trace(x^T y), through two small Gram matrices."""
    return _gram_products(x, y).sum().item()


def norm(x: LowRank) -> float:
    """Return the Frobenius norm; by QR where the columns cancel and Gram matrices would not do."""
    terms_PP = _gram_products(x, x)
    square = terms_PP.sum().item()
    if square > 1e-6 * terms_PP.abs().sum().item():
        return math.sqrt(square)
    return torch.linalg.vector_norm(_core(x)).item()


def square_norm(x: LowRank) -> Tensor:
    """Return the squared Frobenius norm on x's device, float64, without a wait for it.

    Where columns cancel it is as good as Gram matrices are, and 0 only where all their terms are.
    """
    terms_PP = _gram_products(x, x)
    noise = terms_PP.abs().sum() * torch.finfo(torch.float64).eps
    # A root and a square, as who reads a norm does: the same bits.
    return torch.maximum(terms_PP.sum(), noise).sqrt().square()


def norm_of_sum(pieces: Iterable[LowRank], *, max_entries: int = 2**22) -> float:
    """Return the Frobenius norm of a sum of pieces, in time linear in their number.

    Of several pieces, blocks of rows are summed up densely, `max_entries` float64 numbers at a
    time, since the number of their cross terms is quadratic.

    Args:
        pieces: at least one, and iterable again and again: `Pieces` or a list.
    """
    only = _only(pieces)
    if only is not None:
        return norm(only)
    U_OP, V_PI = next(iter(pieces))
    num_rows = max(1, max_entries // V_PI.shape[1])
    square = 0.0
    for start in range(0, U_OP.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        block = sum(piece.U_OP[rows].double() @ piece.V_PI.double() for piece in pieces)
        square += block.square().sum().item()
    return math.sqrt(square)


def singular_values(x: LowRank) -> Tensor:
    """Return the min(O, I, P) largest singular values, falling, float64; all others are zero."""
    return torch.linalg.svdvals(_core(x))


def _only(pieces: Iterable[LowRank]) -> LowRank | None:
    """Return the single piece, or None if there are more."""
    iterator = iter(pieces)
    first = next(iterator)
    return first if next(iterator, None) is None else None


def _gram_products(x: LowRank, y: LowRank) -> Tensor:
    """Return a matrix whose entries sum to trace(x^T y)."""
    return (x.U_OP.double().T @ y.U_OP.double()) * (x.V_PI.double() @ y.V_PI.double().T)


def _core(x: LowRank) -> Tensor:
    """Return a small matrix that has the singular values of x."""
    if _is_dense(x):
        return x.U_OP.double() @ x.V_PI.double()
    R_u = torch.linalg.qr(x.U_OP.double(), mode="r").R
    R_v = torch.linalg.qr(x.V_PI.double().T, mode="r").R
    return R_u @ R_v.T


def _is_dense(x: LowRank) -> bool:
    """Return whether x has more columns than rank: its factors are then larger than the matrix."""
    return x.V_PI.shape[0] > min(x.U_OP.shape[0], x.V_PI.shape[1])


def _svd(x: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of x: QR of both factors, then an SVD of the small core."""
    if _is_dense(x):
        left, S_P, right = torch.linalg.svd(_core(x), full_matrices=False)
    else:
        Q_u, R_u = torch.linalg.qr(x.U_OP.double())
        Q_v, R_v = torch.linalg.qr(x.V_PI.double().T)
        left, S_P, right = torch.linalg.svd(R_u @ R_v.T, full_matrices=False)
        left, right = Q_u @ left, right @ Q_v.T
    noise = S_P[:1] * (max(left.shape[0], right.shape[1]) * torch.finfo(S_P.dtype).eps)
    S_P = S_P.masked_fill(S_P.le(noise), 0)
    largest = left.abs().argmax(dim=0, keepdim=True)
    sign_P = torch.where(left.gather(0, largest)[0] < 0, -1.0, 1.0).to(S_P)
    return left * sign_P, S_P, sign_P[:, None] * right


def _leading_part(pieces: Iterable[LowRank], rank: int, nearly: bool) -> LowRank:
    """Return the best rank-`rank` part of a sum of pieces, by subspace iteration.

    A pass multiplies the sum M by a thin basis and its transpose by the result, then takes the
    leading part within that basis. Passes end when its squared norm grows by less than 1e-7 of
    itself: after 3 or 4 where the singular values have a gap, and after some 20 where they fall
    so slowly that many parts are nearly as good as the best; with `nearly`, after 2, in a
    narrower basis. Deterministic.
    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4.
    """
    U_OP, V_PI = next(iter(pieces))
    num_out, num_in = U_OP.shape[0], V_PI.shape[1]
    width = min(rank + 32 if nearly else 2 * rank + 64, num_out, num_in)
    start = torch.randn(num_in, width, generator=torch.Generator().manual_seed(0)).double()
    basis_IQ = torch.linalg.qr(start.to(V_PI.device)).Q
    square = 0.0
    for _ in range(2 if nearly else 20):
        left_OQ = torch.linalg.qr(_times(pieces, basis_IQ)).Q
        right_IQ = _times((LowRank(p.V_PI.T, p.U_OP.T) for p in pieces), left_OQ)
        basis_IQ = torch.linalg.qr(right_IQ).Q
        within = LowRank(left_OQ, right_IQ.T)
        last, square = square, singular_values(within)[:rank].square().sum().item()
        if square - last <= 1e-7 * square:
            break
    return compress(within, rank)[0]


def _times(pieces: Iterable[LowRank], basis_IQ: Tensor) -> Tensor:
    """Return the sum of the pieces times a thin matrix, float64."""
    total_OQ = torch.zeros(1, 1, dtype=torch.float64, device=basis_IQ.device)
    for piece in pieces:
        inner_PQ = piece.V_PI.double() @ basis_IQ
        total_OQ = total_OQ.expand(len(piece.U_OP), basis_IQ.shape[1]).contiguous()
        total_OQ.addmm_(piece.U_OP.double(), inner_PQ)
        del piece  # only then does a stream have one in memory
    return total_OQ


class LowRank(NamedTuple):
    """The matrix U V, float32."""

    U_OP: Tensor
    V_PI: Tensor


@dataclass(frozen=True)
class Pieces:
    """A sum of low-rank matrices, streamed anew by every iteration.

    At least one piece comes, maybe of 0 columns, so that shapes are always known.
    """

    stream: Callable[[], Iterator[LowRank]]

    def __iter__(self) -> Iterator[LowRank]:
        return self.stream()
