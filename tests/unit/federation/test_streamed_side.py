"""Streams of many clients take no more columns than they need, and a plan tells of a cap."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from many_rounds import rounds_of
from tiny import near, save_adapter

from fedex_scale.config.load import load_config
from fedex_scale.federation import server
from fedex_scale.federation.client import show
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import Pair
from fedex_scale.planning.choice import make_plan
from fedex_scale.planning.machine import this_machine


def fading(rounds, number: int, num_clients: int) -> list[dict[str, Pair]]:
    """Return clients whose spectra fall by a thousand, as trained adapters' do."""
    start = Adapter(rounds.run.adapter(number - 1))
    pairs = {layer: start.pair(layer).float() for layer in start.layers}
    fade = torch.logspace(0, -3, rounds.config.lora.rank)
    clients = [near(pairs, spread=0.02, seed=50 * number + k) for k in range(num_clients)]
    for client in clients:
        for layer, (A, B) in client.items():
            A0, B0 = pairs[layer]
            client[layer] = Pair(A0 + fade[:, None] * (A - A0), B0 + fade * (B - B0))
    return clients


def advance(rounds, clients: list[dict[str, Pair]]) -> tuple[dict, float]:
    """Do a round of clients that weigh alike; return its report and the fold's CPU seconds."""
    number, many = rounds.state.round + 1, len(clients)
    for k, pairs in enumerate(clients):
        save_adapter(rounds.run.client(number, k), pairs, alpha=16)
    began = time.process_time()
    rounds.state, _ = server.aggregate_round(
        rounds.config,
        rounds.engine,
        rounds.targets,
        range(many),
        [1 / many] * many,
        rounds.run,
        rounds.state,
    )
    took = time.process_time() - began
    show(rounds.engine, rounds.run, rounds.state)
    return json.loads((rounds.run.server(number) / "aggregate.json").read_text()), took


def test_a_stream_of_clients_takes_no_more_columns_than_there_are(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, "lora.rank=16", rounds=2)
    report, _ = advance(rounds, fading(rounds, 1, 40))
    for layer in report["layers"]:
        assert layer["side_rank"] <= min(rounds.engine.shapes()[layer["layer"]]), layer["layer"]


def test_a_stream_of_clients_is_not_called_capped_where_all_of_it_fits(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, "lora.rank=16", rounds=2)
    report, _ = advance(rounds, fading(rounds, 1, 40))
    assert report["kept"] > 0.997, "what bfloat16 leaves"
    assert report["cap"] is None


@pytest.mark.parametrize(
    "settings", [["aggregate.side_rank=2"], ["partition.num_clients=80", "lora.rank=8"]]
)
def test_plan_tells_of_a_cap_on_a_single_round(
    tiny_llama: Path, tmp_path: Path, settings: list[str]
) -> None:
    rounds_of(tiny_llama, tmp_path)
    settings = [*settings, "federation.rounds=1", "data.max_length=32"]
    plan = make_plan(load_config(tmp_path / "run.yaml", settings), this_machine())
    assert plan.side is not None
