"""Stream the layers: factors in -> method -> fold -> written -> freed.

Every rank runs the same loop over the same files, computes the same small factors, and adds to
the base just the rows that it stores; rank 0 writes. One layer's factors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from fedex_scale.aggregation.aggregate_report import AggregateReport, LayerReport
from fedex_scale.aggregation.deviation import Deviation, measure
from fedex_scale.aggregation.outliers import Likeness
from fedex_scale.aggregation.ranks import is_streamed
from fedex_scale.aggregation.side import Past, grow, split
from fedex_scale.aggregation.weights import FoldStats, Target, as_stats, fold
from fedex_scale.aggregation.whole import mean_blocks
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.files.adapter_writers import check_finite
from fedex_scale.files.adapters import Adapter, LayerPairs, out_of_range
from fedex_scale.methods.algebra import (
    Clients,
    LowRank,
    Pair,
    ideal_update,
    inner,
    norm,
    norm_of_sum,
)
from fedex_scale.methods.all import METHODS
from fedex_scale.methods.interface import LayerUpdate
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError


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
        side_rank: columns that the side adapter may have (fold: side only).
        past: what earlier rounds left of a layer, its factors on a device; None: there is but this
            one round, whose overflow goes into the base.
    """

    clients: Sequence[Adapter]
    weights: Sequence[float]
    previous: Adapter | None
    rank: int
    scaling: float
    side_rank: int = 0
    past: Callable[[str, torch.device], Past] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.previous or self.clients[0]).layers


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Where an aggregation's results go, a layer at a time; each may be left out.

    Fields:
        adapter: takes the new server adapter.
        residual: takes what the method adds to the base: the factors that a server would send.
        side: takes the side adapter's new columns.
        client: takes what a client that keeps its pair lacks (`assign: keep`), by its index.
        deviation: takes what averaging lost; None where clients are too many to be in memory.
        whole: takes the mean of a weight that clients train whole, by its name in their files.
    """

    adapter: Callable[[str, Pair], None] = _nowhere
    residual: Callable[[str, Iterable[LowRank]], None] = _nowhere
    side: Callable[[str, LowRank], None] = _nowhere
    client: Callable[[str, int, Iterable[LowRank]], None] | None = None
    deviation: Callable[[str, Deviation | None], None] | None = None
    whole: Callable[[str, Iterator[torch.Tensor]], None] | None = None


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
        UserError: clients that disagree with the server in layers or shapes, or are not finite; a
            result that is not.
    """
    check_clients(round)
    report, stats, crossed = AggregateReport(), {}, {}
    likeness = Likeness()
    for layer in round.layers:
        with _in_range(layer):
            target = targets[layer]
            update, clients, previous = update_of(round, method, layer, target.device, seed(layer))
            check_finite(layer, update.pair)
            few = not is_streamed(len(clients.pairs), round.rank)
            likeness.add(clients, few=few)
            sinks.adapter(layer, update.pair)
            _send_corrections(layer, update, clients, sinks)
            if sinks.deviation is not None:
                sinks.deviation(layer, measure(clients, previous) if few else None)
            past = round.past(layer, target.device) if round.past else None
            found, rest, crossed[layer] = _place(
                layer, update, clients, past, round, section, sinks, side_dtype
            )
            stats[layer] = fold(
                target, rest, carry=section.fold != "round", use_kernel=section.fold_kernel
            )
        report.layers.append(found)
        on_layer(layer)
    for name in like_of(round).full_weights if sinks.whole is not None else ():
        sinks.whole(name, mean_blocks(round.clients, round.weights, name, likeness))
    _add_stats(report, targets, stats, crossed)
    report.clients = likeness.clients()
    report.outliers = likeness.notes(_names(round.clients))
    return report


def _names(clients: Sequence[Adapter]) -> list[str]:
    """Return the names of the clients' directories; with their paths if they are alike."""
    names = [client.path.name for client in clients]
    return names if len(set(names)) == len(names) else [str(client.path) for client in clients]


@contextmanager
def _in_range(layer: str) -> Iterator[None]:
    """Turn what a decomposition says of a matrix that is not finite into a UserError."""
    try:
        yield
    except torch.linalg.LinAlgError:
        raise out_of_range(layer) from None


def _place(
    layer: str,
    update: LayerUpdate,
    clients: Clients,
    past: Past | None,
    round: Round,
    section: AggregateSection,
    sinks: Sinks,
    side_dtype: torch.dtype,
) -> tuple[LayerReport, Iterable[LowRank], tuple[float, float] | None]:
    """Put a base update where the fold mode wants it.

    Returns:
        What is known of it; what is left for the base; and where the pieces are many, and the norms
        come from the fold, what the update's squared norm has besides the fold's, and the ideal
        update's besides the update's.
    """
    pieces, few = update.base_update, not is_streamed(len(clients.pairs), round.rank)
    if few:
        pieces = list(pieces)
    found = LayerReport(layer, note=update.note)
    if pieces:
        sinks.residual(layer, pieces)
    if few or past is not None:
        size = norm_of_sum(pieces) if pieces else 0.0
        found = replace(found, ideal_norm=norm_of_sum(ideal_update(clients)), residual_norm=size)
    if past is not None:
        found = replace(found, sum_norm=past.sum_norm, unseen_norm=past.unseen_norm)
    if not pieces:
        return found, [], None
    if section.fold == "side" and past is not None:
        growth = grow(
            pieces,
            past,
            max_rank=round.side_rank,
            tolerance=_tolerance(section, side_dtype),
            dtype=side_dtype,
        )
        sinks.side(layer, growth.part)
        return found.grown(growth, past), [], None
    if past is not None:
        found = replace(found, sum_norm=past.sum_norm_with(pieces))
    in_side = 0.0
    if section.fold == "side":
        part, missed, in_side, pieces = split(pieces, round.side_rank, side_dtype)
        sinks.side(layer, part)
        found = replace(found, missed_norm=missed)
    if few or past is not None:
        return found, pieces, None
    return found, pieces, (in_side, _cross_terms(update, clients.scaling))


def _tolerance(section: AggregateSection, dtype: torch.dtype) -> float:
    if section.side_tolerance != "auto":
        return section.side_tolerance
    return 1e-6 if dtype == torch.float32 else 1e-3


def _cross_terms(update: LayerUpdate, scaling: float) -> float:
    """Return ||P||^2 + 2 <P, U> of a pair's product P and a base update U of many pieces.

    With ||U||^2, which comes from the fold, that is ||P + U||^2, the ideal update's: methods of
    many pieces are exact. A norm of its own would cost as much as the fold.
    """
    product = LowRank(update.pair.B_OR * scaling, update.pair.A_RI)
    return norm(product) ** 2 + 2 * sum(inner(product, piece) for piece in update.base_update)


def update_of(
    round: Round, method: MethodConfig, layer: str, device: torch.device, seed: int
) -> tuple[LayerUpdate, Clients, Pair | None]:
    """Return a method's answer for one layer, and the clients and the server's pair it is for."""
    clients, previous = _read_layer(round, layer, device)
    generator = torch.Generator().manual_seed(seed)
    return METHODS[method.name].update(clients, previous, method, generator), clients, previous


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


def _add_stats(
    report: AggregateReport,
    targets: Mapping[str, Target],
    stats: Mapping[str, Tensor],
    crossed: Mapping[str, tuple[float, float] | None],
) -> None:
    """Add what the folds found to the report, summed over the ranks' shards.

    To read it is the one wait for all folds, also before ZeRO-3 gathers what they wrote: it does
    so on a stream of its own, which waits for no other.
    """
    if not stats:
        return
    ranks = distributed.world_size()
    shares = [1 / ranks if targets[layer].is_whole else 1.0 for layer in stats]
    local = [
        [x * share for x in found]
        for found, share in zip(as_stats(*stats.values()), shares, strict=True)
    ]
    sums = iter(distributed.sum_over_ranks(*(x for found in local for x in found)))
    for i, layer in enumerate(report.layers):
        of_all = FoldStats(*islice(sums, len(FoldStats._fields)))
        report.base_changed |= of_all.intended > 0 and targets[layer.layer].writable
        report.layers[i] = found = layer.folded(of_all, crossed[layer.layer])
        if not all(math.isfinite(x) for x in astuple(found) if isinstance(x, float)):
            raise out_of_range(layer.layer)


def like_of(round: Round) -> Adapter:
    """Return the adapter that all must be like."""
    return round.previous or round.clients[0]


def _told(adapter: Adapter) -> str:
    specs = adapter.full_specs()
    return ", ".join(f"{name} {shape}" for name, (_, shape) in specs.items()) or "none"


def check_clients(round: Round) -> None:
    """Raise a UserError that names the client and layer where an adapter does not fit."""
    like = like_of(round)
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
        if round.previous is not None and adapter.full_specs() != like.full_specs():
            raise UserError(
                f"{adapter.path}: expected the server's whole weights, {_told(like)}, got "
                f"{_told(adapter)}; was it trained for other labels?"
            )
        for layer in like.layers:
            expected, got = like.shapes(layer), adapter.shapes(layer)
            if got != expected:
                raise UserError(
                    f"{adapter.path}, layer {layer}: expected shape {expected}, got {got}; "
                    "was it trained on another base model?"
                )
