"""The server's part of a round: draw, and aggregate into the run directory. It needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from fedex_scale.aggregation import deviation
from fedex_scale.aggregation.aggregator import AggregateReport, Round, Sinks, aggregate, update_of
from fedex_scale.aggregation.deviation import Deviation
from fedex_scale.aggregation.ranks import base_update_rank, is_streamed
from fedex_scale.aggregation.screening import screen
from fedex_scale.aggregation.weights import Target
from fedex_scale.config.settings import Config
from fedex_scale.federation.facts import Facts, open_adapter
from fedex_scale.federation.history import History
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapter_writers import AdapterWriter, PartWriter
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import DEVIATION_FILE, REPORT_FILE, RunDir
from fedex_scale.methods.algebra import LowRank, Pair
from fedex_scale.methods.interface import fresh_pair
from fedex_scale.runtime import distributed
from fedex_scale.runtime.phases import phase
from fedex_scale.runtime.seeds import derive_seed

Source = Callable[[str], Pair]
"""An adapter's factors, by layer."""


def fresh_adapter(config: Config, facts: Facts, *owner: int | str) -> Source:
    """Return a draw of the adapter by layer: PEFT's A, and B = 0, so that the model is the base's.

    Args:
        owner: what the draw depends on besides the seed and the layer; nothing for the one draw
            that all clients share.
    """
    shapes = facts.shapes()

    def draw(layer: str) -> Pair:
        seed = derive_seed(config.run.seed, "init", *owner, layer)
        generator = torch.Generator().manual_seed(seed)
        num_out, num_in = shapes[layer]
        rank = config.lora.rank
        like = Pair(torch.empty(rank, num_in), torch.empty(num_out, rank))
        return fresh_pair(like, generator)

    return draw


def starts(config: Config, facts: Facts, run: RunDir, round: int) -> Callable[[int], Source]:
    """Return a function from a client to what it starts from: the server's adapter, read once.

    With init: per_client, in the first round, a draw of its own, as in the paper's public code.
    """
    weights = cache(Adapter(run.adapter(round - 1)).weights)
    if round == 1 and config.federation.init == "per_client":

        def start(client: int) -> Source:
            own = fresh_adapter(config, facts, client)
            return lambda name: weights(name) if name in facts.whole_shapes() else own(name)

        return start
    return lambda client: weights


@phase("writing")
def draw_adapter(config: Config, facts: Facts, run: RunDir) -> None:
    """Write the adapter that the first round begins with."""
    whole = dict(facts.whole_weights())
    if distributed.is_main():
        draw = fresh_adapter(config, facts)
        with open_adapter(facts, run.adapter(0), config.lora, config.model.path) as writer:
            for layer in facts.shapes():
                writer.write(layer, draw(layer))
            for name, weight in whole.items():
                writer.write(name, weight)
    distributed.barrier()


@phase("folding")
def refold(
    config: Config, facts: Facts, targets: Mapping[str, Target], run: RunDir, state: ServerState
) -> None:
    """Change a fresh base as the rounds before `state` did; every rank must take part.

    Aggregates their clients' adapters once more, into the base alone: the same sums in the same
    order, whatever the ranks, so that base and carry come out as they were, bit for bit.
    """
    if not state.base_changed:
        return
    past = ServerState()
    while past.round < state.round:
        taken = _taken(run, past.round + 1)
        past, _ = aggregate_round(config, facts, targets, *taken, run, past, write=False)


@phase("folding")
def aggregate_round(
    config: Config,
    facts: Facts,
    targets: Mapping[str, Target],
    clients: Sequence[int],
    weights: Sequence[float],
    run: RunDir,
    state: ServerState,
    *,
    skipped: Sequence[int] = (),
    write: bool = True,
) -> tuple[ServerState, AggregateReport]:
    """Aggregate the clients' adapters of one round, and fold; every rank must take part.

    Args:
        targets: the base weights on this rank, which a fold changes in place.
        clients: the clients of the round; their adapters are in the run directory.
        weights: w_k, summing to 1.
        skipped: clients that failed and are left out, for the record.
        write: write the results; not where the base alone is to be changed again.

    Returns:
        The new state, and what was done. The factors are in the run directory.
    """
    number = state.round + 1
    screened = screen(_task(config, run, number, clients, weights), config.aggregate)
    stay, past = screened.stay, cache(partial(_past_task, config, run))
    task = replace(
        screened.round,
        side_rank=facts.side_rank,
        past=History(run, state.round, partial(_residual_again, config, past)).past,
    )
    deviations: dict[str, Deviation | None] = {}
    with ExitStack() as stack:
        sinks = Sinks()
        if write and distributed.is_main():
            sinks = _open_sinks(config, facts, run.server(number), len(stay), stack)
            sinks = replace(sinks, deviation=deviations.__setitem__)
        report = aggregate(
            task,
            config.method,
            config.aggregate,
            targets,
            sinks,
            seed=partial(_fresh_seed, config, number),
            side_dtype=facts.dtype,
        )
    report.outliers += screened.notes
    report.cap = _cap_note(config, facts, report, len(stay))
    if write and distributed.is_main():
        taken = {
            "clients": [clients[k] for k in stay],
            "weights": list(task.weights),
            "skipped": list(skipped),
            "rejected": [client for k, client in enumerate(clients) if k not in stay],
            "update_norms": screened.norms,
        }
        text = json.dumps(taken | report.as_dict(), indent=2) + "\n"
        (run.server(number) / REPORT_FILE).write_text(text)
        text = json.dumps(deviation.as_tree(deviations), indent=1) + "\n"
        (run.server(number) / DEVIATION_FILE).write_text(text)
    distributed.barrier()
    changed = state.base_changed or report.base_changed
    sees = changed if facts.has_planes else facts.side_rank > 0
    return ServerState(round=number, has_side=sees, base_changed=changed), report


def _cap_note(
    config: Config, facts: Facts, report: AggregateReport, num_clients: int
) -> str | None:
    """Return a line on what a full side adapter costs, and what more room would."""
    if not any(layer.side_capped for layer in report.layers):
        return None
    rounds = config.federation.rounds
    needed = rounds * base_update_rank(config.method, num_clients, config.lora.rank)
    shapes = facts.shapes().values()
    column, weights = sum(o + i for o, i in shapes), sum(o * i for o, i in shapes)
    more, lost = max(0, needed - facts.side_rank), 1 - (report.kept_of_all or 0)
    line = (
        f"the side adapter is full at {facts.side_rank} columns: {lost:.2%} of "
        "all rounds' residuals is not seen in the forward pass, and kept by the server; "
        f"aggregate.side_rank={needed} holds {rounds} rounds, for {more * column / weights:.0%} of "
        f"the adapted layers' work and {more * column * facts.dtype.itemsize / 1e6:,.0f} MB more"
    )
    if config.model.quantization != "none":  # its weights take no second plane
        return line
    return (
        f"{line}; aggregate.fold=planes holds any number, for 100% and "
        f"{weights * facts.dtype.itemsize / 1e6:,.0f} MB"
    )


def _task(
    config: Config, run: RunDir, number: int, clients: Sequence[int], weights: Sequence[float]
) -> Round:
    return Round(
        clients=[Adapter(run.client(number, client)) for client in clients],
        weights=weights,
        previous=Adapter(run.adapter(number - 1)),
        rank=config.lora.rank,
        scaling=config.lora.scaling,
    )


def _taken(run: RunDir, number: int) -> tuple[list[int], list[float]]:
    """Return the clients of a round that is done, and their weights."""
    done = run.round(number)
    return done.clients, done.weights


def _fresh_seed(config: Config, number: int, layer: str) -> int:
    return derive_seed(config.run.seed, "fresh", number, layer)


def _past_task(config: Config, run: RunDir, number: int) -> Round:
    """Return what a round that is done aggregated."""
    return screen(_task(config, run, number, *_taken(run, number)), config.aggregate).round


def _residual_again(
    config: Config, past: Callable[[int], Round], number: int, layer: str
) -> Iterable[LowRank]:
    """Return what a round that is done added to the base, from its clients' adapters."""
    task, seed = past(number), _fresh_seed(config, number, layer)
    return update_of(task, config.method, layer, torch.device("cpu"), seed)[0].base_update


def _open_sinks(
    config: Config, facts: Facts, path: Path, num_clients: int, stack: ExitStack
) -> Sinks:
    """Open the PEFT directories that a round's results are written to."""
    base, shapes, rank = config.model.path, facts.shapes(), config.lora.rank
    adapter = stack.enter_context(open_adapter(facts, path / "adapter", config.lora, base))
    sinks = Sinks(adapter=adapter.write, whole=adapter.write_full)
    columns = base_update_rank(config.method, num_clients, rank)
    if columns and not is_streamed(num_clients, rank):
        residual = AdapterWriter(path / "residual", shapes, rank=columns, alpha=columns, base=base)
        sinks = replace(sinks, residual=stack.enter_context(residual).write_sum)
    if facts.side_rank:
        most = max(columns, facts.side_rank)
        side = PartWriter(path / "side", shapes, max_rank=most, dtype=facts.dtype, base=base)
        sinks = replace(sinks, side=stack.enter_context(side).write)
    return sinks
