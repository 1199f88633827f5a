"""One client cannot move the server further than the config allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import near, random_pairs, save_adapter

from fedex_scale.aggregation.aggregator import Round
from fedex_scale.aggregation.screening import gram_of, screen, update_norm
from fedex_scale.config.federation import AggregateSection
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.methods.algebra import Pair
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
    done = screen(round, AggregateSection())
    assert (done.round, done.stay, done.norms, done.notes) == (round, [0, 1, 2], [], [])


def test_a_client_too_far_away_is_left_out(round: Round) -> None:
    done = screen(round, AggregateSection(reject_update_norm=10))
    assert (done.stay, done.notes) == ([0, 1], ["left out of the round: c2"])
    assert done.round.weights == pytest.approx([0.625, 0.375])
    expected = [
        sum(
            (flat(client, layer) - flat(round.previous, layer)).square().sum() for layer in SHAPES
        ).sqrt()
        for client in round.clients
    ]
    assert done.norms == pytest.approx([float(x) for x in expected], rel=1e-5)
    with pytest.raises(UserError, match=r"0\.001 refuses every client"):
        screen(round, AggregateSection(reject_update_norm=0.001))


def test_a_client_is_clipped_to_the_bound_and_keeps_its_direction(round: Round) -> None:
    done = screen(round, AggregateSection(clip_update_norm=1.0))
    taken, norms = done.round, done.norms
    assert (done.stay, taken.weights) == ([0, 1, 2], [0.5, 0.3, 0.2])
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


Build = Callable[..., Round]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return rounds of honest clients, and of one that does something to its change."""
    server = random_pairs(SHAPES, rank=2, seed=0)
    towards = near(server, spread=0.3, seed=1)

    def change(k: int, factor: float) -> dict[str, Pair]:
        own = near(towards, spread=0.1, seed=k + 2)
        return {
            layer: Pair(*(x + factor * (y - x) for x, y in zip(pair, own[layer], strict=True)))
            for layer, pair in server.items()
        }

    def rounds(*factors: float, previous: bool = True) -> Round:
        adapters = [
            Adapter(save_adapter(tmp_path / f"c{k}", change(k, factor), alpha=4))
            for k, factor in enumerate(factors)
        ]
        own = Adapter(save_adapter(tmp_path / "server", server, alpha=4)) if previous else None
        weights = [1 / len(factors)] * len(factors)
        return Round(clients=adapters, weights=weights, previous=own, rank=2, scaling=2.0)

    return rounds


@pytest.mark.parametrize("previous", [True, False])
def test_inner_products_are_those_of_dense_updates(build: Build, previous: bool) -> None:
    round = build(1, 0.5, -2, previous=previous)

    def dense(adapter: Adapter) -> torch.Tensor:
        pairs = [adapter.pair(layer) for layer in SHAPES]
        return torch.cat([(2.0 * B.double() @ A.double()).flatten() for A, B in pairs])

    start = dense(round.previous) if previous else 0
    updates_KN = torch.stack([dense(client) - start for client in round.clients])
    torch.testing.assert_close(gram_of(round), updates_KN @ updates_KN.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("factors", "left_out"),
    [
        ((1, 1, 1), []),
        ((1, 1.5, 0.7, 1, 1.2), []),
        ((1, 1, -1), ["c2"]),
        ((-1, 1, 1, 1), ["c0"]),
        ((1, 1e4, 1), ["c1"]),
        ((1, 1, 0), ["c2"]),
        ((1, 1, -1e6), ["c2"]),
        ((1, 6, 1, 1, 1), ["c1"]),
        ((1, -1e3, 1, 1, -1), ["c1", "c4"]),
        ((1, 50), []),
    ],
)
def test_trimmed_leaves_out_who_is_unlike_most(build: Build, factors, left_out) -> None:
    section, round = AggregateSection(robust="trimmed"), build(*factors)
    done = screen(round, section)
    out = [client.path.name for client in round.clients if client not in done.round.clients]
    assert out == left_out
    assert sum(done.round.weights) == pytest.approx(1)
    assert done.notes == [f"left out of the round: {', '.join(out)}"] * bool(out)
    assert screen(done.round, section).stay == list(range(len(done.stay))), "as when resumed"


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("factor", [30.0, 1e6, -1e6])
def test_clip_lets_nobody_go_further_than_the_median(build: Build, factor, previous) -> None:
    section = AggregateSection(robust="clip")
    round = build(1, factor, 1.5, previous=previous)
    done = screen(round, section)
    limit = sorted(done.norms)[1] * (1 + 1e-5)
    parts = [client for client in done.round.clients if client in round.clients]
    assert len(parts) == 2, "the median's and the smaller are as they were"
    (clipped,) = [client for client in done.round.clients if client not in round.clients]
    flat_change = 0.0
    for layer in SHAPES:
        pair = clipped.pair(layer)
        before = round.previous.pair(layer) if previous else Pair(0, 0)
        part = [x - y for x, y in zip(pair, before, strict=True)]
        if not previous:
            part = [2.0 * pair.B_OR @ pair.A_RI]
        flat_change += sum(float(x.double().square().sum()) for x in part)
    assert flat_change**0.5 <= limit
    assert done.notes[-1].startswith("c1: scaled by ")
    again = screen(replace(round, clients=done.round.clients), section)
    assert again.norms == pytest.approx([min(x, limit) for x in done.norms], rel=1e-4)


def test_a_round_of_which_most_stand_out_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match="trimmed expected most of 4 clients to be alike, got 2"):
        screen(build(1, 1, 1e3, 1e6), AggregateSection(robust="trimmed"))


def test_those_that_are_left_have_no_weight(build: Build) -> None:
    round = replace(build(1, 1, 1e3), weights=[0.0, 0.0, 1.0])
    with pytest.raises(UserError, match="clients that are alike to have a weight above 0"):
        screen(round, AggregateSection(robust="trimmed"))


def test_a_client_without_a_server_is_measured_by_its_products(build: Build) -> None:
    round = build(1, 2, 3, previous=False)
    norms = [update_norm(client, None) for client in round.clients]
    assert norms == pytest.approx(gram_of(round).diagonal().sqrt().tolist())
