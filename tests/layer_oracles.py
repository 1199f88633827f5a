"""Synthetic clients of one layer, and their float64 dense counterparts."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedex_scale.methods.algebra import Clients, LowRank, Pair

WEIGHTS = [0.5, 0.2, 0.3]


def make_clients(
    weight_K: Sequence[float] = WEIGHTS,
    *,
    num_out: int = 23,
    num_in: int = 17,
    rank: int = 4,
    spread: float = 0.3,
    scaling: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Clients:
    """Return clients that differ from a common pair by `spread`, relative."""
    draw = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, num_in, generator=draw)
    B_OR = torch.randn(num_out, rank, generator=draw)
    pairs = [
        Pair(
            (A_RI + spread * torch.randn(A_RI.shape, generator=draw)).to(dtype),
            (B_OR + spread * torch.randn(B_OR.shape, generator=draw)).to(dtype),
        )
        for _ in weight_K
    ]
    return Clients(pairs, weight_K, scaling)


def dense(parts: Iterable[LowRank]) -> Tensor | float:
    """Return the float64 sum of low-rank parts."""
    return sum((part.U_OP.double() @ part.V_PI.double() for part in parts), 0.0)


def product(pair: Pair, scaling: float = 1.0) -> Tensor:
    return scaling * pair.B_OR.double() @ pair.A_RI.double()


def dense_ideal(clients: Clients) -> Tensor:
    return sum(
        weight * product(pair, clients.scaling)
        for pair, weight in zip(clients.pairs, clients.weight_K, strict=True)
    )


def dense_mean(clients: Clients) -> Pair:
    """Return the float64 means, summed the plain way."""
    return Pair(
        _weighted([pair.A_RI for pair in clients.pairs], clients.weight_K),
        _weighted([pair.B_OR for pair in clients.pairs], clients.weight_K),
    )


def dense_residual(clients: Clients) -> Tensor:
    """Return the residual in the fully centred form, whose float64 error is negligible."""
    mean = dense_mean(clients)
    return sum(
        weight
        * clients.scaling
        * (pair.B_OR.double() - mean.B_OR)
        @ (pair.A_RI.double() - mean.A_RI)
        for pair, weight in zip(clients.pairs, clients.weight_K, strict=True)
    )


def best_of_rank(W_OI: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def _weighted(factors: Iterable[Tensor], weight_K: Sequence[float]) -> Tensor:
    return sum(weight * factor.double() for factor, weight in zip(factors, weight_K, strict=True))


class OnDisk(Sequence[Pair]):
    """Clients that come into memory when they are looked at; counts loads and who is alive."""

    def __init__(self, num_clients: int, **options) -> None:
        self.num_clients, self.options = num_clients, options
        self.loads = self.alive = self.most_alive = 0

    def __len__(self) -> int:
        return self.num_clients

    def __getitem__(self, k: int) -> Pair:
        if not 0 <= k < self.num_clients:
            raise IndexError(k)
        pair = make_clients([1.0], seed=k, **self.options).pairs[0]
        self.loads += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(pair.B_OR, self._gone)
        return pair

    def _gone(self) -> None:
        self.alive -= 1
