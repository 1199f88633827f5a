"""One client cannot move the server further than the config allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import near, random_pairs, save_adapter

from fedex_scale.aggregation.aggregator import Round
from fedex_scale.aggregation.screening import screen
from fedex_scale.config.federation import AggregateSection
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.runtime.errors import UserError

SHAPES = {"model.layers.0.q_proj": (23, 17), "model.layers.0.up_proj": (29, 17)}


@pytest.fixture
def round(tmp_path: Path) -> Round:
    """Two clients near the server's adapter, and one far away."""
    server = random_pairs(SHAPES, rank=2, seed=0)
    spreads = (0.01, 0.02, 5.0)
    clients = [
        Adapter(save_adapter(tmp_path / f"c{k}", near(server, spread=s, seed=k), alpha=4))
        for k, s in enumerate(spreads)
    ]
    previous = Adapter(save_adapter(tmp_path / "server", server, alpha=4))
    return Round(clients=clients, weights=[0.5, 0.3, 0.2], previous=previous, rank=2, scaling=2.0)


def flat(adapter, layer: str) -> torch.Tensor:
    (pair,) = LayerPairs([adapter], layer, rank=2, scaling=2.0, device=torch.device("cpu"))
    return torch.cat([factor.flatten() for factor in pair])


def test_no_bound_reads_nothing(round: Round) -> None:
    assert screen(round, AggregateSection()) == (round, [0, 1, 2], [])


def test_a_client_too_far_away_is_left_out(round: Round) -> None:
    taken, stay, norms = screen(round, AggregateSection(reject_update_norm=10))
    assert stay == [0, 1]
    assert taken.weights == pytest.approx([0.625, 0.375])
    expected = [
        sum(
            (flat(client, layer) - flat(round.previous, layer)).square().sum() for layer in SHAPES
        ).sqrt()
        for client in round.clients
    ]
    assert norms == pytest.approx([float(x) for x in expected], rel=1e-5)
    with pytest.raises(UserError, match=r"0\.001 refuses every client"):
        screen(round, AggregateSection(reject_update_norm=0.001))


def test_a_client_is_clipped_to_the_bound_and_keeps_its_direction(round: Round) -> None:
    taken, stay, norms = screen(round, AggregateSection(clip_update_norm=1.0))
    assert (stay, taken.weights) == ([0, 1, 2], [0.5, 0.3, 0.2])
    assert taken.clients[:2] == round.clients[:2]
    total = 0.0
    for layer in SHAPES:
        server = flat(round.previous, layer)
        change = flat(taken.clients[2], layer) - server
        whole = flat(round.clients[2], layer) - server
        torch.testing.assert_close(change * norms[2], whole, rtol=1e-4, atol=1e-4)
        total += float(change.square().sum())
    assert total == pytest.approx(1.0, rel=1e-4)
    assert taken.clients[2].path.name == "c2"


def test_bounds_are_positive() -> None:
    with pytest.raises(UserError, match="clip_update_norm: expected a number above 0"):
        AggregateSection(clip_update_norm=0)
