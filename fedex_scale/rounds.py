"""Federated LoRA with exact aggregation: the algorithm, from top to bottom.

    the server draws A once, and sets B = 0                        (init: shared; eq. 10)
    in each round:
        each chosen client k, one after another on one engine:
            A_k, B_k = train from the server's A, B on its own examples
        A, B = sum_k w_k A_k, sum_k w_k B_k                        (eq. 11, 12)
        W0  += s (sum_k w_k B_k A_k - B A)                         (eq. 14: the residual)

A method (methods/) says what A, B and the addition to W0 are; the aggregator streams the layers.
With fold: side, W0 stays as it is and a second frozen adapter holds the sum.
Source: Singhal et al., arXiv:2410.09432.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from fedex_scale import server
from fedex_scale.adapters import Adapter
from fedex_scale.client import ClientUpdate, train_client, write_client
from fedex_scale.config import Config, FederationSection
from fedex_scale.data.batching import Examples
from fedex_scale.engine import Engine, Source, fold_targets
from fedex_scale.state import RunDir, ServerState, derive_seed


def run_rounds(
    config: Config,
    engine: Engine,
    clients: Sequence[Examples],
    run: RunDir,
    *,
    pad_id: int,
    evaluate: Callable[[int], None],
    log: Callable[..., None],
) -> ServerState:
    """Run every round and return the server's last state.

    Args:
        clients: each client's examples.
        pad_id: the token that fills up a batch.
        evaluate: called with the round when the engine holds the server's model.
        log: called with an event's name (step, client, round) and its fields.

    Raises:
        UserError: a client's loss or adapter is no longer finite.
    """
    state = ServerState()
    server.draw_adapter(config, engine, run)
    server.show(engine, run, state)
    evaluate(0)
    targets = fold_targets(engine)
    for round in range(1, config.federation.rounds + 1):
        chosen = choose_clients(config.federation, len(clients), config.run.seed, round)
        updates = []
        for client in chosen:
            update = train_client(
                engine,
                clients[client],
                start_of(config, engine, run, round, client),
                config.train,
                seed=config.run.seed,
                round=round,
                client=client,
                side=state.has_side,
                pad_id=pad_id,
                on_step=lambda fields: log("step", **fields),
            )
            write_client(engine, update, run.client(round, client), config.lora, config.model.path)
            log("client", **vars(update))
            updates.append(update)
        weights = client_weights(config.federation, updates)
        state, report = server.aggregate_round(config, engine, targets, chosen, weights, run, state)
        server.show(engine, run, state)
        log("round", round=round, **report.summary(config.aggregate))
        evaluate(round)
    return state


def choose_clients(
    section: FederationSection, num_clients: int, seed: int, round: int
) -> list[int]:
    """Return the clients of a round: a seeded draw of the fraction, in ascending order."""
    count = max(1, round_half_up(section.client_fraction * num_clients))
    draw = random.Random(derive_seed(seed, "choice", round))
    return sorted(draw.sample(range(num_clients), count))


def client_weights(section: FederationSection, updates: Sequence[ClientUpdate]) -> list[float]:
    """Return w_k, summing to 1: shares of the examples, or all alike."""
    uniform = section.weights == "uniform"
    shares = [1 if uniform else update.num_examples for update in updates]
    return [share / sum(shares) for share in shares]


def start_of(config: Config, engine: Engine, run: RunDir, round: int, client: int) -> Source:
    """Return what a client starts from, by layer: the server's adapter.

    With init: per_client, in the first round, a draw of its own, as in the paper's public code.
    """
    if round == 1 and config.federation.init == "per_client":
        return server.fresh_adapter(config, engine, client)
    return Adapter(run.adapter(round - 1)).pair


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)
