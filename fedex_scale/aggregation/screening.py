"""Bound what one client can do to the server: its change of the adapter is clipped or refused."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedex_scale.aggregation.aggregator import Round, check_clients
from fedex_scale.aggregation.outliers import standing_out
from fedex_scale.aggregation.whole import spans
from fedex_scale.config.federation import AggregateSection
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.methods.algebra import LowRank, Pair, norm
from fedex_scale.runtime.errors import UserError

MAX_COLUMNS = 8192
"""Of all clients' factors of a layer together, whose inner products fit in memory."""


@dataclass(frozen=True)
class Clipped:
    """A client's adapter whose distance from the server's is scaled; read as an `Adapter` is.

    Without a server's, its product is scaled.
    """

    adapter: Adapter
    server: Adapter | None
    factor: float

    def __getattr__(self, name: str):
        return getattr(self.server if self.server and name != "path" else self.adapter, name)

    def pair(self, layer: str) -> Pair:
        if self.server is None:
            A_RI, B_OR = self.adapter.pair(layer).float()
            return Pair(A_RI, self.factor * B_OR)
        before = self.server.pair(layer).float()
        change = change_of(self.adapter, self.server, layer)
        return Pair(*(x + self.factor * dx for x, dx in zip(before, change, strict=True)))

    def full_block(self, name: str, span: tuple[int, int]) -> Tensor:
        before = self.server.full_block(name, span)
        return before + self.factor * (self.adapter.full_block(name, span) - before)


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What the bounds leave of a round.

    Fields:
        round: what is to be aggregated.
        stay: indices of the clients that stay.
        norms: every client's; none where no bound asks for them.
        notes: a line on what was done.
    """

    round: Round
    stay: list[int]
    norms: list[float]
    notes: list[str]


def screen(round: Round, section: AggregateSection) -> Screened:
    """Apply the bounds of the config to a round's clients; without any, read nothing.

    Done to what it left, it leaves the same, so that a resumed run goes on alike.

    Raises:
        UserError: no client stays, or one is not what it should be.
    """
    clip, reject, robust = section.clip_update_norm, section.reject_update_norm, section.robust
    stay, notes = list(range(len(round.clients))), []
    if clip is None and reject is None and robust == "none":
        return Screened(round=round, stay=stay, norms=[], notes=[])
    check_clients(round)
    norms = [update_norm(client, round.previous) for client in round.clients]
    if reject is not None:
        stay = [k for k in stay if norms[k] <= reject]
    if not stay:
        raise UserError(
            f"aggregate.reject_update_norm: {reject} refuses every client, whose updates have "
            f"norms from {min(norms):.4g} on; raise it"
        )
    if robust == "trimmed":
        alike = _alike(replace(round, clients=[round.clients[k] for k in stay]))
        stay = [stay[k] for k in alike]
    if out := [client.path.name for k, client in enumerate(round.clients) if k not in stay]:
        notes.append(f"left out of the round: {', '.join(out)}")
    if robust == "clip":
        clip = min(clip or math.inf, statistics.median_low([norms[k] for k in stay]))
    clients: list = [round.clients[k] for k in stay]
    for place, k in enumerate(stay):
        if clip is not None and norms[k] > clip:
            clients[place] = Clipped(clients[place], round.previous, clip / norms[k])
            notes.append(f"{clients[place].path.name}: scaled by {clip / norms[k]:.3g}")
    taken = replace(round, clients=clients, weights=_shares(round.weights, stay))
    return Screened(round=taken, stay=stay, norms=norms, notes=notes)


def update_norm(client: Adapter, server: Adapter | None) -> float:
    """Return the norm of a client's change of factors, at the server's scaling, and of the head.

    Without a server's adapter, that of the products.
    """
    if server is None:
        products = (LowRank(*_product(client, layer)) for layer in client.layers)
        return math.sqrt(sum(norm(product) ** 2 for product in products))
    total = 0.0
    for name in server.full_weights:
        change = client.file.read(name).double() - server.file.read(name).double()
        total += float(change.square().sum())
    for layer in server.layers:
        total += sum(float(dx.double().square().sum()) for dx in change_of(client, server, layer))
    return math.sqrt(total)


def change_of(client: Adapter, server: Adapter, layer: str) -> Pair:
    """Return what a client changed in one layer's factors, float32."""
    cpu = torch.device("cpu")
    rank, scaling = server.rank_of(layer), server.scaling_of(layer)
    (after,) = LayerPairs([client], layer, rank=rank, scaling=scaling, device=cpu)
    return Pair(*(x - y for x, y in zip(after.float(), server.pair(layer).float(), strict=True)))


def gram_of(round: Round) -> Tensor:
    """Return the inner products of the clients' updates since the server's adapter, float64.

    Exact, unlike those of `outliers.Likeness`, as a client that knows what is drawn there could
    hide from it: tr((B_j A_j)^T B_k A_k) is the sum over (A_j A_k^T) * (B_j^T B_k).
    """
    adapters = [*round.clients, *([round.previous] if round.previous else [])]
    count, rank = len(adapters), round.rank
    if count * rank > MAX_COLUMNS:
        raise UserError(
            f"aggregate.robust: trimmed compares every two clients, at most {MAX_COLUMNS // rank} "
            f"of rank {rank}, got {len(round.clients)}; use clip, or a smaller "
            "federation.client_fraction"
        )
    total = torch.zeros(count, count, dtype=torch.float64)
    for layer in round.layers:
        products = [_product(x, layer) for x in adapters]
        A = torch.cat([A_RI for _, A_RI in products]).double()
        B = torch.cat([B_OR for B_OR, _ in products], dim=1).double()
        ranks = torch.tensor([len(A_RI) for _, A_RI in products])
        owner = torch.repeat_interleave(torch.arange(count), ranks)
        ones = torch.nn.functional.one_hot(owner, count).double()
        total += ones.T @ ((A @ A.T) * (B.T @ B)) @ ones
    for name in round.clients[0].full_weights:
        for span in spans(round.clients[0].file.entries[name]):
            whole = torch.stack([x.full_block(name, span).flatten().double() for x in adapters])
            total += whole @ whole.T
    if round.previous is None:
        return total
    change = torch.cat([torch.eye(count - 1), -torch.ones(count - 1, 1)], dim=1).double()
    return change @ total @ change.T


def _product(adapter: Adapter, layer: str) -> tuple[Tensor, Tensor]:
    """Return s B and A of one layer, float32, or float64 where the file has it."""
    scaling, cpu = adapter.scaling_of(layer), torch.device("cpu")
    rank = adapter.rank_of(layer)
    (pair,) = LayerPairs([adapter], layer, rank=rank, scaling=scaling, device=cpu)
    return pair.B_OR.double() * scaling, pair.A_RI.double()


def _alike(round: Round) -> list[int]:
    """Return the clients that are left when nobody stands out any more, more than half of all."""
    gram_KK, stay = gram_of(round), list(range(len(round.clients)))
    while out := standing_out(gram_KK[stay][:, stay]):
        stay = [k for place, k in enumerate(stay) if place not in out]
        if len(stay) <= len(round.clients) / 2:
            raise UserError(
                f"aggregate.robust: trimmed expected most of {len(round.clients)} clients to be "
                f"alike, got {len(stay)}; look at their norms with robust: none, or use clip"
            )
    return stay


def _shares(weights: Sequence[float], stay: list[int]) -> list[float]:
    if len(stay) == len(weights):
        return list(weights)
    total = sum(weights[k] for k in stay)
    if not total:
        raise UserError(
            "aggregate.robust: expected clients that are alike to have a weight above 0, got none; "
            "give them weights, or look at their norms with robust: none"
        )
    return [weights[k] / total for k in stay]
