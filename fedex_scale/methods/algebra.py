"""What one layer's clients sum up to: means, the ideal update, and what averaging loses.

A layer is applied as W + s B A. Clients are read one at a time, in a fixed order; differences and
means are float64, results float32. Sums over clients come as `Pieces` of bounded size, so that
memory does not grow with K, and time grows linearly.

Legend: K clients, R rank of a LoRA pair, O out_features, I in_features, P rank of a piece.
Everything is in nn.Linear's orientation: A_RI, B_OR, W_OI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, aminmax, float32, float64, zeros_like
from torch.nn.functional import pad

from fedex_scale.methods.lowrank import (
    LowRank,
    Pieces,
    compress,
    compress_pieces,
    inner,
    norm,
    norm_of_sum,
    round_factors,
    singular_values,
    square_norm,
    stack,
    truncate,
)
from fedex_scale.runtime.errors import UserError

__all__ = [
    "MAX_RANK",
    "Clients",
    "LowRank",
    "Pair",
    "Pieces",
    "align",
    "all_finite",
    "client_residual",
    "compress",
    "compress_pieces",
    "ideal_update",
    "inner",
    "lora_scaling",
    "mean_pair",
    "norm",
    "norm_of_sum",
    "normalise_weights",
    "residual",
    "round_factors",
    "singular_values",
    "square_norm",
    "stack",
    "truncate",
]

MAX_RANK = 512
"""Columns of one piece of a sum over clients (at least one client's R)."""


def lora_scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """Return s = alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv:2312.03732).

    Raises:
        UserError: rank below 1, or alpha not a positive number.
    """
    if rank < 1:
        raise UserError(f"rank: expected at least 1, got {rank}; choose for instance 32")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"alpha: expected a number above 0, got {alpha}; choose for instance 16")
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def normalise_weights(weights: Iterable[float]) -> list[float]:
    """Return the weights divided by their sum.

    Raises:
        UserError: a weight is negative or not finite, or none is above 0.
    """
    try:
        weight_K = [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError):
        raise UserError("weights: expected numbers, one a client; correct them") from None
    for client, weight in enumerate(weight_K):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"weights: client {client}: expected a number of at least 0, got {weight}; "
                "give 0 to leave a client out"
            )
    largest = max(weight_K, default=0.0)
    if largest == 0:
        raise UserError(
            "weights: expected at least one above 0, got none; give 1 to each to count all alike"
        )
    total = math.fsum(weight / largest for weight in weight_K)
    return [weight / largest / total for weight in weight_K]


def all_finite(*tensors: Tensor) -> bool:
    """Return whether no number of the tensors is NaN or Inf.

    A NaN or Inf survives the search for the extremes, which takes a twentieth of the time of
    `isfinite` over every number.
    """
    return all(
        math.isfinite(low) and math.isfinite(high)
        for low, high in (aminmax(tensor) for tensor in tensors if tensor.numel())
    )


def align(pair: Pair, scaling: float, *, rank: int, to_scaling: float) -> Pair:
    """Rewrite a pair for another rank and scaling; s B A stays what it is.

    Zeros fill up A and B, and scaling / to_scaling goes into B, so that clients of different rank
    and alpha become uniform.

    Returns:
        A (rank, I) and B (O, rank), float32.

    Raises:
        UserError: the pair has a higher rank.
    """
    missing = rank - pair.A_RI.shape[0]
    if missing < 0:
        raise UserError(
            f"rank: expected at most {rank}, got {rank - missing}; "
            "raise the common rank to the highest of all clients"
        )
    B_OR = (pair.B_OR.double() * (scaling / to_scaling)).float()
    return Pair(pad(pair.A_RI.float(), (0, 0, 0, missing)), pad(B_OR, (0, missing)))


def mean_pair(clients: Clients) -> Pair:
    """Return the weighted means of A and B in float64; `.float()` rounds them.

    Summed as differences from the heaviest client, in the clients' order: identical clients give
    that very client, bit for bit.
    """
    heaviest = _heaviest(clients)
    anchor = clients.pairs[heaviest].double()
    A_RI, B_OR = zeros_like(anchor.A_RI), zeros_like(anchor.B_OR)
    for k in _others(clients, heaviest):
        pair, weight = clients.pairs[k].double(), clients.weight_K[k]
        A_RI.add_(pair.A_RI - anchor.A_RI, alpha=weight)
        B_OR.add_(pair.B_OR - anchor.B_OR, alpha=weight)
    return Pair(anchor.A_RI + A_RI, anchor.B_OR + B_OR)


def ideal_update(clients: Clients, *, max_rank: int = MAX_RANK) -> Pieces:
    """Return s sum_k w_k B_k A_k, the change of W that the clients ask for; rank K R."""

    def block(k: int) -> LowRank:
        pair = clients.pairs[k]
        return LowRank(pair.B_OR.double() * _share(clients, k), pair.A_RI)

    return Pieces(
        lambda: _pack(block, _others(clients), clients.pairs[_heaviest(clients)], max_rank)
    )


def residual(clients: Clients, mean: Pair, *, max_rank: int = MAX_RANK) -> Pieces:
    """Return what averaging the factors loses, ideal update - s B_mean A_mean; rank (K-1) R.

        s sum_{k != j} w_k (B_k - B_mean)(A_k - A_j),    j the heaviest client

    Centred, because the plain difference cancels badly when clients drift little. One client
    drops out: as sum_k w_k (B_k - B_mean) = 0, any one matrix may be taken from every A_k, and
    A_j leaves nothing of client j. For that B_mean must not be rounded to float32, whose error
    can exceed the residual. Identical clients give factors that are exactly zero.
    Source: Singhal et al., arXiv:2410.09432, eq. 14; the centred form is ours.

    Args:
        mean: `mean_pair(clients)`, float64.
    """
    assert mean.B_OR.dtype == float64
    heaviest = _heaviest(clients)

    def pieces() -> Iterator[LowRank]:
        anchor_RI = clients.pairs[heaviest].A_RI.float()

        def block(k: int) -> LowRank:
            pair = clients.pairs[k].float()  # two float32's difference is rounded once, in float32
            return LowRank((pair.B_OR - mean.B_OR) * _share(clients, k), pair.A_RI - anchor_RI)

        return _pack(block, _others(clients, heaviest), mean, max_rank)

    return Pieces(pieces)


def client_residual(
    clients: Clients, mean: Pair, client: int, *, max_rank: int = MAX_RANK
) -> Pieces:
    """Return what client i lacks if it keeps its own pair, ideal update - s B_i A_i; rank K R.

        s sum_{k != i} w_k (B_k - B_i) A_k  +  s B_i (A_mean - A_i)

    Centred on the client, for the reason told in `residual`.

    Args:
        mean: `mean_pair(clients)`, float64.
    """
    assert mean.A_RI.dtype == float64

    def pieces() -> Iterator[LowRank]:
        own = clients.pairs[client].double()

        def block(k: int) -> LowRank:
            if k == client:
                return LowRank(own.B_OR * clients.scaling, mean.A_RI - own.A_RI)
            pair = clients.pairs[k].double()
            return LowRank((pair.B_OR - own.B_OR) * _share(clients, k), pair.A_RI)

        return _pack(block, [*_others(clients, client), client], mean, max_rank)

    return Pieces(pieces)


def _heaviest(clients: Clients) -> int:
    return max(range(len(clients.pairs)), key=clients.weight_K.__getitem__)


def _others(clients: Clients, client: int | None = None) -> list[int]:
    """Return the clients that count, less the named one."""
    return [k for k, weight in enumerate(clients.weight_K) if weight > 0 and k != client]


def _share(clients: Clients, client: int) -> float:
    return clients.scaling * clients.weight_K[client]


def _pack(
    block: Callable[[int], LowRank], ks: Sequence[int], like: Pair, max_rank: int
) -> Iterator[LowRank]:
    """Yield the blocks of rank R of the clients `ks`, side by side in float32 pieces.

    Holds no piece while the consumer works: one that drops a piece before it asks for the next
    has one in memory, of max_rank (O + I) numbers. No clients give one piece of 0 columns.
    """
    rank = like.A_RI.shape[0]
    per_piece = max(1, max_rank // rank)
    if len(ks) > per_piece:
        per_piece = max(1, per_piece // 2)  # of a stream, no piece need be as wide

    def piece(some: Sequence[int]) -> LowRank:
        U_OP = like.B_OR.new_empty(like.B_OR.shape[0], len(some) * rank, dtype=float32)
        V_PI = like.A_RI.new_empty(len(some) * rank, like.A_RI.shape[1], dtype=float32)
        for i, k in enumerate(some):
            columns = slice(i * rank, (i + 1) * rank)
            U_OP[:, columns], V_PI[columns] = block(k)
        return LowRank(U_OP, V_PI)

    for start in range(0, max(1, len(ks)), per_piece):
        yield piece(ks[start : start + per_piece])


class Pair(NamedTuple):
    """One layer's LoRA pair, applied as W + s B A."""

    A_RI: Tensor
    B_OR: Tensor

    def float(self) -> Pair:
        return Pair(self.A_RI.float(), self.B_OR.float())

    def double(self) -> Pair:
        return Pair(self.A_RI.double(), self.B_OR.double())


class Clients(NamedTuple):
    """What one layer's clients returned, aligned to one rank and one scaling.

    Fields:
        pairs: one a client, any float dtype. May be lazy: each access may be a read from disk.
        weight_K: non-negative, sums to 1; a client of weight 0 does not count.
        scaling: s = alpha / R, or alpha / sqrt(R).
    """

    pairs: Sequence[Pair]
    weight_K: Sequence[float]
    scaling: float
