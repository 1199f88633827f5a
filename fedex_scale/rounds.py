"""Federated LoRA with exact aggregation: the algorithm, from top to bottom.

    the server draws A once, and sets B = 0                        (init: shared; eq. 10)
    in each round:
        each chosen client k, one after another on one engine:
            A_k, B_k = train from the server's A, B on its own examples
        A, B = sum_k w_k A_k, sum_k w_k B_k                        (eq. 11, 12)
        W0  += s (sum_k w_k B_k A_k - B A)                         (eq. 14: the residual)

A method (methods/) says what A, B and the addition to W0 are; the aggregator streams the layers.
With fold: side, W0 stays as it is, and a second frozen adapter grows by each round's residual.
Source: Singhal et al., arXiv:2410.09432.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from fedex_scale.config.federation import FederationSection
from fedex_scale.config.settings import Config
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import fold_targets
from fedex_scale.engine.parameters import Source
from fedex_scale.federation import server
from fedex_scale.federation.client import ClientUpdate, read_update, show, train_client
from fedex_scale.federation.saves import Saver
from fedex_scale.federation.state import ClientProgress, Place, ServerState
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.interface import Examples


def run_rounds(
    config: Config,
    engine: Engine,
    clients: Sequence[Examples],
    run: RunDir,
    saver: Saver,
    *,
    evaluate: Callable[[ServerState], None],
    log: Callable[..., None],
) -> ServerState:
    """Run every round that is not done yet, and return the server's last state.

    Args:
        clients: each client's examples.
        saver: saves the run's place, and knows where an interrupted run goes on.
        evaluate: called with the server's state before the first round, and after each.
        log: called with an event's name (step, client, failure, round) and its fields.

    Raises:
        UserError: a client's loss or adapter is no longer finite.
    """
    targets = fold_targets(engine)
    if saver.place is None:
        server.draw_adapter(config, engine, run)
        saver.save(Place())
    state = saver.place.state
    server.refold(config, engine, targets, run, state)
    evaluate(state)
    for round in range(state.round + 1, config.federation.rounds + 1):
        show(engine, run, state)
        start_of = server.starts(config, engine, run, round)
        for client in choose_clients(config.federation, len(clients), config.run.seed, round):
            if client not in saver.place.done + saver.place.skipped:
                setting = (config, engine, clients[client], start_of, saver, log)
                saver.attempt(client, partial(train, *setting), log)
        saver.settle()  # the last client is written by now
        done, skipped = saver.place.done, saver.place.skipped
        updates = [read_update(run.client(round, client)) for client in done]
        weights = client_weights(config.federation, updates)
        state, report = server.aggregate_round(
            config, engine, targets, done, weights, run, state, skipped=skipped
        )
        log("round", round=round, **report.summary(config.aggregate))
        saver.save(Place(state=state))
        evaluate(state)
    return state


def train(
    config: Config,
    engine: Engine,
    examples: Examples,
    start_of: Callable[[int], Source],
    saver: Saver,
    log: Callable[..., None],
    begin: ClientProgress,
) -> ClientUpdate:
    """Train one client of the round from where it is; the engine then holds its adapter."""
    state, client = saver.place.state, begin.client
    return train_client(
        engine,
        examples,
        saver.adapter() if begin.step else start_of(client),
        config.train,
        seed=config.run.seed,
        round=state.round + 1,
        client=client,
        side=state.has_side,
        begin=begin,
        restore=saver.restore,
        on_step=lambda fields: log("step", **fields),
        save=saver.after_step,
    )


def choose_clients(
    section: FederationSection, num_clients: int, seed: int, round: int
) -> list[int]:
    """Return the clients of a round: a seeded draw of the fraction, in ascending order."""
    draw = random.Random(derive_seed(seed, "choice", round))
    return sorted(draw.sample(range(num_clients), section.num_drawn(num_clients)))


def client_weights(section: FederationSection, updates: Sequence[ClientUpdate]) -> list[float]:
    """Return w_k, summing to 1: shares of the examples that each counts for, or all alike.

    Raises:
        UserError: too many clients of the round failed.
    """
    if len(updates) < section.min_clients:
        raise UserError(
            f"federation.min_clients: expected {section.min_clients} clients, got {len(updates)}; "
            "the others failed, or sent nothing that can be used"
        )
    shares = [_counted(section, update) for update in updates]
    return [share / sum(shares) for share in shares]


def _counted(section: FederationSection, update: ClientUpdate) -> int:
    """Return the examples that a client counts for."""
    if section.weights == "uniform":
        return 1
    if update.client < len(section.fixed_examples):
        return section.fixed_examples[update.client]
    return min(update.num_examples, section.max_examples or update.num_examples)
