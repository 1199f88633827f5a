"""The server's part of a round: draw, aggregate into the run directory, and show the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from fedex_scale import deviation, distributed
from fedex_scale.adapters import Adapter, AdapterWriter
from fedex_scale.aggregator import (
    AggregateReport,
    Round,
    Sinks,
    aggregate,
    base_update_rank,
    is_worth_keeping,
)
from fedex_scale.algebra import Pair
from fedex_scale.client import open_adapter
from fedex_scale.config.settings import Config
from fedex_scale.deviation import Deviation
from fedex_scale.engine import Engine, Source, set_adapter, set_side
from fedex_scale.methods import fresh_pair
from fedex_scale.phases import phase
from fedex_scale.screening import screen
from fedex_scale.state import RunDir, ServerState, derive_seed
from fedex_scale.weights import Target

REPORT_FILE = "aggregate.json"
DEVIATION_FILE = "deviation.json"


def fresh_adapter(config: Config, engine: Engine, *owner: int | str) -> Source:
    """Return a draw of the adapter by layer: PEFT's A, and B = 0, so that the model is the base's.

    Args:
        owner: what the draw depends on besides the seed and the layer; nothing for the one draw
            that all clients share.
    """
    shapes = engine.shapes()

    def draw(layer: str) -> Pair:
        seed = derive_seed(config.run.seed, "init", *owner, layer)
        generator = torch.Generator().manual_seed(seed)
        num_out, num_in = shapes[layer]
        rank = config.lora.rank
        like = Pair(torch.empty(rank, num_in), torch.empty(num_out, rank))
        return fresh_pair(like, generator)

    return draw


def starts(config: Config, engine: Engine, run: RunDir, round: int) -> Callable[[int], Source]:
    """Return a function from a client to what it starts from: the server's adapter, read once.

    With init: per_client, in the first round, a draw of its own, as in the paper's public code.
    """
    if round == 1 and config.federation.init == "per_client":
        return partial(fresh_adapter, config, engine)
    pair = cache(Adapter(run.adapter(round - 1)).pair)
    return lambda client: pair


@phase("writing")
def draw_adapter(config: Config, engine: Engine, run: RunDir) -> None:
    """Write the adapter that the first round begins with."""
    if distributed.is_main():
        draw = fresh_adapter(config, engine)
        with open_adapter(engine, run.adapter(0), config.lora, config.model.path) as writer:
            for layer in engine.layers:
                writer.write(layer, draw(layer))
    distributed.barrier()


@phase("folding")
def refold(
    config: Config, engine: Engine, targets: Mapping[str, Target], run: RunDir, state: ServerState
) -> None:
    """Change a fresh engine's base as the rounds before `state` did; every rank must take part.

    Aggregates their clients' adapters once more, into the base alone: the same sums in the same
    order, whatever the ranks, so that base and carry come out as they were, bit for bit.
    """
    if not state.base_changed:
        return
    past = ServerState()
    while past.round < state.round:
        taken = json.loads((run.server(past.round + 1) / REPORT_FILE).read_text())
        clients, weights = taken["clients"], taken["weights"]
        past, _ = aggregate_round(config, engine, targets, clients, weights, run, past, write=False)


@phase("folding")
def show(engine: Engine, run: RunDir, state: ServerState) -> None:
    """Let the engine hold the server's model: its adapter, and the side adapter if there is one."""
    if state.has_side:
        set_side(engine, Adapter(run.side(state.round)).pair)
    set_adapter(engine, Adapter(run.adapter(state.round)).pair, side=state.has_side)


@phase("folding")
def aggregate_round(
    config: Config,
    engine: Engine,
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
    task = Round(
        clients=[Adapter(run.client(number, client)) for client in clients],
        weights=weights,
        previous=Adapter(run.adapter(state.round)),
        rank=config.lora.rank,
        scaling=config.lora.scaling,
        side=Adapter(run.side(state.round)) if state.has_side else None,
    )
    task, stay, norms = screen(task, config.aggregate)
    update_rank = base_update_rank(config.method, len(stay), config.lora.rank)
    side_rank = engine.side_rank if update_rank else 0
    task = replace(task, side_rank=side_rank)
    deviations: dict[str, Deviation | None] = {}
    with ExitStack() as stack:
        sinks = Sinks()
        if write and distributed.is_main():
            sinks = _open_sinks(config, engine, run.server(number), update_rank, side_rank, stack)
            sinks = replace(sinks, deviation=deviations.__setitem__)
        report = aggregate(
            task,
            config.method,
            config.aggregate,
            targets,
            sinks,
            seed=lambda layer: derive_seed(config.run.seed, "fresh", number, layer),
            side_dtype=engine.dtype,
        )
    keeps_side = state.has_side and not side_rank
    if write and distributed.is_main():
        if keeps_side:
            shutil.copytree(run.side(state.round), run.side(number))
        taken = {
            "clients": [clients[k] for k in stay],
            "weights": list(task.weights),
            "skipped": list(skipped),
            "rejected": [client for k, client in enumerate(clients) if k not in stay],
            "update_norms": norms,
        }
        text = json.dumps(taken | report.as_dict(), indent=2) + "\n"
        (run.server(number) / REPORT_FILE).write_text(text)
        text = json.dumps(deviation.as_tree(deviations), indent=1) + "\n"
        (run.server(number) / DEVIATION_FILE).write_text(text)
    distributed.barrier()
    changed = state.base_changed or report.base_changed
    has_side = side_rank > 0 or keeps_side
    return ServerState(round=number, has_side=has_side, base_changed=changed), report


def _open_sinks(
    config: Config, engine: Engine, path: Path, update_rank: int, side_rank: int, stack: ExitStack
) -> Sinks:
    """Open the PEFT directories that a round's results are written to."""
    base, shapes = config.model.path, engine.shapes()

    def unscaled(name: str, rank: int) -> AdapterWriter:
        writer = AdapterWriter(path / name, shapes, rank=rank, alpha=rank, base=base)
        return stack.enter_context(writer)

    adapter = stack.enter_context(open_adapter(engine, path / "adapter", config.lora, base))
    sinks = Sinks(adapter=adapter.write)
    if update_rank and is_worth_keeping(update_rank, shapes.values()):
        sinks = replace(sinks, residual=unscaled("residual", update_rank).write_sum)
    if side_rank:
        side = unscaled("side", side_rank)
        sinks = replace(sinks, side=lambda layer, kept: side.write_sum(layer, [kept]))
    return sinks
