"""Bound what one client can do to the server: its change of the adapter is clipped or refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedex_scale.aggregation.aggregator import Round, check_clients
from fedex_scale.config.federation import AggregateSection
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime.errors import UserError


@dataclass(frozen=True)
class Clipped:
    """A client's adapter whose distance from the server's is scaled; read as an `Adapter` is."""

    adapter: Adapter
    server: Adapter
    factor: float

    def __getattr__(self, name: str):
        return getattr(self.adapter if name == "path" else self.server, name)

    def pair(self, layer: str) -> Pair:
        before = self.server.pair(layer).float()
        change = change_of(self.adapter, self.server, layer)
        return Pair(*(x + self.factor * dx for x, dx in zip(before, change, strict=True)))

    def full_block(self, name: str, span: tuple[int, int]) -> Tensor:
        before = self.server.full_block(name, span)
        return before + self.factor * (self.adapter.full_block(name, span) - before)


def screen(round: Round, section: AggregateSection) -> tuple[Round, list[int], list[float]]:
    """Apply the bounds of the config to a round's clients; without any, read nothing.

    Returns:
        The round to aggregate, the indices of clients that stay, and every client's norm.

    Raises:
        UserError: no client stays, or one is not what it should be.
    """
    clip, reject = section.clip_update_norm, section.reject_update_norm
    if clip is None and reject is None:
        return round, list(range(len(round.clients))), []
    check_clients(round)
    norms = [update_norm(client, round.previous) for client in round.clients]
    stay = [k for k, norm in enumerate(norms) if reject is None or norm <= reject]
    if not stay:
        raise UserError(
            f"aggregate.reject_update_norm: {reject} refuses every client, whose updates have "
            f"norms from {min(norms):.4g} on; raise it"
        )
    clients: list = [round.clients[k] for k in stay]
    for place, k in enumerate(stay):
        if clip is not None and norms[k] > clip:
            clients[place] = Clipped(clients[place], round.previous, clip / norms[k])
    return replace(round, clients=clients, weights=_shares(round.weights, stay)), stay, norms


def update_norm(client: Adapter, server: Adapter) -> float:
    """Return the norm of a client's change of factors, at the server's scaling, and of the head."""
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


def _shares(weights: Sequence[float], stay: list[int]) -> list[float]:
    if len(stay) == len(weights):
        return list(weights)
    return [weights[k] / sum(weights[j] for j in stay) for k in stay]
