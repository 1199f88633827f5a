"""How long a client trains and at which rate; who takes part, and what weight each has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from fedex_scale.config.federation import FederationSection
from fedex_scale.config.learning import LoraSection, TrainSection
from fedex_scale.data.batching import plan_steps
from fedex_scale.engine.training import train_step
from fedex_scale.federation.client import ClientUpdate, learning_rate, num_steps
from fedex_scale.rounds import choose_clients, client_weights

UPDATE = ClientUpdate(
    round=1,
    client=0,
    num_examples=1,
    num_steps=1,
    num_tokens=1,
    first_loss=1.0,
    last_loss=1.0,
    seconds=1.0,
)
# As transformers names them.
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def library_rates(name: str, peak: float, num_warmup: int, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=num_warmup, num_training_steps=num_steps
    )
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "num_warmup"),
    [(313, 0.02, 7), (50, 0.02, 1), (10, 0.0, 0), (7, 0.5, 4), (2, 0.02, 1), (3, 0.99, 3)],
)
def test_learning_rate_is_transformers_curve(
    schedule: str, steps: int, warmup_ratio: float, num_warmup: int
) -> None:
    section = TrainSection(learning_rate=3e-4, schedule=schedule, warmup_ratio=warmup_ratio)
    got = [learning_rate(step, steps, section) for step in range(steps)]
    expected = library_rates(SCHEDULERS[schedule], 3e-4, num_warmup, steps)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-20)


@given(
    num_examples=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 4),
    max_steps=st.none() | st.integers(1, 20),
)
def test_num_steps_is_the_length_of_the_plan(num_examples, batch_size, epochs, max_steps) -> None:
    section = TrainSection(batch_size=batch_size, local_epochs=epochs, max_steps=max_steps)
    plan = plan_steps([1] * num_examples, batch_size=batch_size, epochs=epochs, seed=0)
    assert num_steps(num_examples, section) == len(plan[:max_steps])


def test_weights_are_shares_of_the_examples_or_alike() -> None:
    updates = [replace(UPDATE, client=k, num_examples=n) for k, n in enumerate([10, 30, 60])]
    assert client_weights(FederationSection(), updates) == [0.1, 0.3, 0.6]
    uniform = FederationSection(weights="uniform")
    assert client_weights(uniform, updates) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("fraction", "num_clients", "count"),
    [(1.0, 7, 7), (0.5, 7, 4), (0.5, 5, 3), (0.1, 3, 1), (0.3, 10, 3), (0.001, 100, 1)],
)
def test_a_fraction_of_the_clients_is_drawn(fraction: float, num_clients: int, count: int) -> None:
    section = FederationSection(client_fraction=fraction)
    chosen = choose_clients(section, num_clients, seed=0, round=1)
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(num_clients))


def test_the_draw_depends_on_seed_and_round_alone() -> None:
    section = FederationSection(client_fraction=0.3)
    draws = {
        (seed, round): tuple(choose_clients(section, 20, seed, round))
        for seed in range(3)
        for round in range(1, 5)
    }
    assert len(set(draws.values())) == len(draws)
    for (seed, round), chosen in draws.items():
        assert tuple(choose_clients(section, 20, seed, round)) == chosen
    rounds = [choose_clients(section, 20, seed=0, round=round) for round in range(1, 41)]
    everyone = {client for chosen in rounds for client in chosen}
    assert everyone == set(range(20))


def test_every_module_trains_in_training_mode(tiny_llama: Path) -> None:
    engine = build(tiny_llama, lora=LoraSection(rank=2, dropout=0.5))
    engine.model.get_base_model().eval()  # as a loaded model is, whatever its wrapper says
    ids = torch.arange(8)[None]
    train_step(engine, [{"input_ids": ids, "labels": ids}], units=7, lr=1e-3)
    assert all(module.training for module in engine.model.modules())
