"""Stream the layers: factors in -> method -> fold -> written -> freed.

Every rank runs the same loop over the same files, computes the same small factors, and adds to
the base just the rows that it stores; rank 0 writes. One layer's factors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from fedex_scale import distributed
from fedex_scale.adapters import Adapter, LayerPairs
from fedex_scale.aggregate_report import AggregateReport, LayerReport
from fedex_scale.algebra import (
    MAX_RANK,
    Clients,
    LowRank,
    Pair,
    Pieces,
    compress,
    compress_pieces,
    ideal_update,
    inner,
    norm,
    norm_of_sum,
    stack,
)
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.deviation import Deviation, measure
from fedex_scale.errors import UserError
from fedex_scale.methods import METHODS, LayerUpdate
from fedex_scale.weights import FoldStats, Target, fold


def _nowhere(layer: str, result: object) -> None:
    """Drop a result: the sink of ranks that do not write."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one aggregation reads and where its results go.

    Fields:
        clients: the clients' adapters; alike in layers, free in rank and alpha.
        weights: one a client, summing to 1.
        previous: the server's adapter that the round began with; None if it is not known.
        rank, scaling: of the server's adapter.
        side: the side adapter before this round, or None.
        side_rank: rank of the side adapter (fold: side only).
    """

    clients: Sequence[Adapter]
    weights: Sequence[float]
    previous: Adapter | None
    rank: int
    scaling: float
    side: Adapter | None = None
    side_rank: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.previous or self.clients[0]).layers


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Where an aggregation's results go, a layer at a time; each may be left out.

    Fields:
        adapter: takes the new server adapter.
        residual: takes what the method adds to the base: the factors that a server would send.
        side: takes the new side adapter.
        client: takes what a client that keeps its pair lacks (`assign: keep`), by its index.
        deviation: takes what averaging lost; None where clients are too many to be in memory.
    """

    adapter: Callable[[str, Pair], None] = _nowhere
    residual: Callable[[str, Iterable[LowRank]], None] = _nowhere
    side: Callable[[str, LowRank], None] = _nowhere
    client: Callable[[str, int, Iterable[LowRank]], None] | None = None
    deviation: Callable[[str, Deviation | None], None] | None = None


def base_update_rank(method: MethodConfig, num_clients: int, rank: int) -> int:
    """Return the columns that hold what a method adds to the base in one round, 0 for nothing.

    So many suffice for every layer; small layers may fill fewer.
    """
    if method.name not in ("fedex", "flora"):
        return 0
    if method.name == "flora" or method.assign == "reinit":
        return num_clients * rank
    lost = (num_clients - 1) * rank
    if method.assign == "svd" and is_streamed(num_clients, rank):
        return (num_clients + 1) * rank  # the ideal update, less its best part
    return lost if method.svd_rank is None else min(method.svd_rank, lost)


def is_streamed(num_clients: int, rank: int) -> bool:
    """Return whether a layer's clients are too many to be held in memory at once."""
    return num_clients > max(1, MAX_RANK // rank)


def is_worth_keeping(rank: int, shapes: Iterable[tuple[int, int]]) -> bool:
    """Return whether factors of this rank are smaller than the weights (O, I) themselves."""
    shapes = list(shapes)
    return rank * sum(o + i for o, i in shapes) <= sum(o * i for o, i in shapes)


def default_side_rank(method: MethodConfig, num_clients: int, rank: int) -> int:
    """Return the rank that holds one round's base update whole, at most 128; 0 if there is none."""
    return min(128, base_update_rank(method, num_clients, rank))


def side_rank_of(
    method: MethodConfig, section: AggregateSection, num_clients: int, rank: int
) -> int:
    """Return the rank of a run's side adapter, 0 for none."""
    usual = default_side_rank(method, num_clients, rank)
    if section.fold != "side" or not usual:
        return 0
    return section.side_rank or usual


def aggregate(
    round: Round,
    method: MethodConfig,
    section: AggregateSection,
    targets: Mapping[str, Target],
    sinks: Sinks,
    *,
    seed: Callable[[str], int],
    side_dtype: torch.dtype = torch.float32,
    on_layer: Callable[[str], None] = lambda layer: None,
) -> AggregateReport:
    """Aggregate one round, layer by layer; every rank must take part.

    Args:
        targets: where each layer's base weight takes a fold, by layer.
        sinks: what to do with the results.
        seed: by layer, for methods that draw a fresh adapter.
        side_dtype: dtype in which the forward pass holds the side adapter.
        on_layer: called when a layer is done, for progress.

    Raises:
        UserError: clients that disagree with the server in layers or shapes, or are not finite.
    """
    check_clients(round)
    report, stats, crossed = AggregateReport(), {}, {}
    for layer in round.layers:
        target = targets[layer]
        clients, previous = _read_layer(round, layer, target.device)
        generator = torch.Generator().manual_seed(seed(layer))
        update = METHODS[method.name].update(clients, previous, method, generator)
        sinks.adapter(layer, update.pair)
        _send_corrections(layer, update, clients, sinks)
        ideal_norm = residual_norm = missed = in_side = 0.0
        rest = update.base_update
        streamed = is_streamed(len(clients.pairs), round.rank)
        if sinks.deviation is not None:
            sinks.deviation(layer, None if streamed else measure(clients, previous))
        if not streamed:
            rest = list(rest)
        few = isinstance(rest, Sequence)
        if few:
            ideal_norm = norm_of_sum(ideal_update(clients))
            residual_norm = norm_of_sum(rest) if rest else 0.0
        if rest:
            sinks.residual(layer, rest)
        if rest and section.fold == "side":
            missed, in_side, rest = _into_side(layer, rest, round, sinks, side_dtype)
        if not few:
            crossed[layer] = (in_side, _cross_terms(update, clients.scaling))
        stats[layer] = fold(target, rest, carry=section.fold != "round")
        report.layers.append(LayerReport(layer, ideal_norm, residual_norm, missed, update.note))
        on_layer(layer)
    _add_stats(report, targets, stats, crossed)
    return report


def _cross_terms(update: LayerUpdate, scaling: float) -> float:
    """Return ||P||^2 + 2 <P, U> of a pair's product P and a base update U of many pieces.

    With ||U||^2, which comes from the fold, that is ||P + U||^2, the ideal update's: methods of
    many pieces are exact. A norm of its own would cost as much as the fold.
    """
    product = LowRank(update.pair.B_OR * scaling, update.pair.A_RI)
    return norm(product) ** 2 + 2 * sum(inner(product, piece) for piece in update.base_update)


def _read_layer(round: Round, layer: str, device: torch.device) -> tuple[Clients, Pair | None]:
    """Return one layer of the clients, read at once if they are few, and of the server."""
    pairs: Sequence[Pair] = LayerPairs(
        round.clients, layer, rank=round.rank, scaling=round.scaling, device=device
    )
    if not is_streamed(len(pairs), round.rank):
        pairs = list(pairs)
    previous = None
    if round.previous is not None:
        previous = Pair(*(factor.to(device) for factor in round.previous.pair(layer))).float()
    return Clients(pairs, round.weights, round.scaling), previous


def _send_corrections(layer: str, update: LayerUpdate, clients: Clients, sinks: Sinks) -> None:
    """Hand over what each client lacks that keeps its own pair, for the untouched base."""
    if update.client_update is not None and sinks.client is not None:
        for k, own in enumerate(clients.pairs):
            pair = LowRank(own.B_OR * clients.scaling, own.A_RI)
            sinks.client(layer, k, [pair, *update.client_update(k)])


def _into_side(
    layer: str, update: Iterable[LowRank], round: Round, sinks: Sinks, dtype: torch.dtype
) -> tuple[float, float, Iterable[LowRank]]:
    """Put a base update into the side adapter.

    The best rank-`side_rank` part of the old side adapter plus the update is kept; of many pieces
    one that is nearly the best, as what overflows is not lost: it is for the base.

    Returns:
        What the forward pass misses of it, as it rounds to `dtype`; of many pieces how much of the
        update's squared norm is not in the overflow's; the overflow.
    """
    old = None
    if round.side is not None:
        pair, device = round.side.pair(layer), next(iter(update)).U_OP.device
        old = LowRank(pair.B_OR.float().to(device), pair.A_RI.float().to(device))
    first = [] if old is None else [old]
    in_side = 0.0
    if isinstance(update, Sequence):
        kept, rest = compress(stack(*first, *update), round.side_rank)
        overflow = [rest] if rest.U_OP.any() else []
    else:
        parts = Pieces(lambda: chain(first, update))
        kept, overflow = compress_pieces(parts, round.side_rank, nearly=True)
        in_side = norm(kept) ** 2  # a projection of the parts' sum: orthogonal to the overflow
        if old is not None:
            in_side -= norm(old) ** 2 + 2 * sum(inner(old, piece) for piece in update)
    sinks.side(layer, kept)
    seen = LowRank(*(factor.to(dtype).float() for factor in kept))
    missed = norm(stack(seen, LowRank(-kept.U_OP, kept.V_PI)))
    return missed, in_side, overflow


def _add_stats(
    report: AggregateReport,
    targets: Mapping[str, Target],
    stats: Mapping[str, FoldStats],
    crossed: Mapping[str, tuple[float, float]],
) -> None:
    """Add what the folds found to the report, summed over the ranks' shards.

    Args:
        crossed: where the pieces are many, what the squared norm of the update has besides the
            fold's, and what the ideal update's has besides the update's.
    """
    ranks = distributed.world_size()
    shares = [1 / ranks if targets[layer].is_whole else 1.0 for layer in stats]
    local = [
        x * c for s, c in zip(stats.values(), shares, strict=True) for x in (s.intended, s.missed)
    ]
    sums = distributed.sum_over_ranks(*local)
    for i, layer in enumerate(report.layers):
        intended, missed = sums[2 * i], sums[2 * i + 1]
        report.base_changed |= intended > 0 and targets[layer.layer].writable
        total = math.hypot(layer.missed_norm, math.sqrt(missed))
        layer = replace(layer, missed_norm=total)
        if layer.layer in crossed:
            update = max(0.0, intended + crossed[layer.layer][0])
            ideal = max(0.0, update + crossed[layer.layer][1])
            layer = replace(layer, ideal_norm=math.sqrt(ideal), residual_norm=math.sqrt(update))
        report.layers[i] = layer


def check_clients(round: Round) -> None:
    """Raise a UserError that names the client and layer where an adapter does not fit."""
    like = round.previous or round.clients[0]
    whose = "the server's" if round.previous else f"those of {like.path}"
    for adapter in round.clients:
        unknown = set(adapter.layers) - set(like.layers)
        if unknown:
            raise UserError(
                f"{adapter.path}: layer {min(unknown)} is not among {whose}; "
                "every client must adapt the same layers"
            )
        if adapter.rank > round.rank:
            raise UserError(
                f"{adapter.path}: rank {adapter.rank}, but the server has {round.rank}; "
                "raise lora.rank"
            )
        for layer in like.layers:
            expected, got = like.shapes(layer), adapter.shapes(layer)
            if got != expected:
                raise UserError(
                    f"{adapter.path}, layer {layer}: expected shape {expected}, got {got}; "
                    "was it trained on another base model?"
                )
