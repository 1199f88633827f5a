"""Deviation from the factors equals its dense definition in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layer_oracles import dense_ideal, dense_mean, make_clients, product
from resuming import write_config
from torch.linalg import svdvals

from fedex_scale.aggregation.deviation import Deviation, as_tree, effective_rank, measure, total
from fedex_scale.methods.algebra import Clients, Pair
from fedex_scale.run import run_config

NUM_OUT, NUM_IN, RANK = 23, 17, 4


@pytest.mark.parametrize("spread", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.3], [0.0, 0.4, 0.6], [1 / 6] * 6])
def test_equals_the_dense_definition(weights: list[float], spread: float) -> None:
    clients = make_clients(weights, num_out=NUM_OUT, num_in=NUM_IN, rank=RANK, spread=spread)
    previous = make_clients([1.0], num_out=NUM_OUT, num_in=NUM_IN, rank=RANK, seed=9).pairs[0]
    found = measure(clients, previous)
    ideal, averaged = dense_ideal(clients), product(dense_mean(clients), clients.scaling)
    lost = ideal - averaged
    exact = {"rel": 1e-6, "abs": 1e-7 * ideal.norm().item()}
    assert found.residual_norm == pytest.approx(lost.norm().item(), **exact)
    scaled = lost.norm().item() / math.sqrt(NUM_OUT * NUM_IN)
    assert found.scaled == pytest.approx(scaled, **exact)
    assert found.norm_ratio == pytest.approx((averaged.norm() / ideal.norm()).item(), rel=1e-6)
    cosine = (averaged * ideal).sum() / averaged.norm() / ideal.norm()
    assert found.cosine == pytest.approx(cosine.item(), rel=1e-6)
    change = (ideal - product(previous, clients.scaling)).norm().item()
    assert found.change_norm == pytest.approx(change, **exact)
    spreads = [
        weight * (product(pair, clients.scaling) - ideal).square().sum().item()
        for pair, weight in zip(clients.pairs, weights, strict=True)
    ]
    assert found.drift == pytest.approx(math.sqrt(sum(spreads)) / change, rel=1e-5)
    values = svdvals(lost)[: len(found.singular_values)]
    torch.testing.assert_close(
        torch.tensor(found.singular_values, dtype=torch.float64),
        values,
        rtol=1e-4,
        atol=exact["abs"],
    )


def test_identical_clients_deviate_by_nothing() -> None:
    found = measure(make_clients([0.5, 0.5], spread=0.0), None)
    assert (found.residual_norm, found.effective_rank, found.relative) == (0, 0, 0)
    assert found.cosine == found.norm_ratio == pytest.approx(1)
    assert found.drift == pytest.approx(0, abs=1e-6)


def test_clients_that_did_nothing_are_not_divided_by() -> None:
    pair = Pair(torch.randn(2, 5), torch.zeros(3, 2))
    found = measure(Clients([pair, pair], [0.5, 0.5], 0.5), pair)
    assert (found.cosine, found.norm_ratio, found.drift, found.relative) == (1, 1, 0, 0)


@pytest.mark.parametrize(("values", "rank"), [([3, 3, 3], 3), ([5, 0, 0], 1), ([], 0)])
def test_effective_rank(values: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(rank)


def test_total_is_that_of_a_block_matrix() -> None:
    both = [measure(make_clients(seed=seed), None) for seed in (0, 1)]
    found: Deviation = total(both)
    assert found.residual_norm == pytest.approx(math.hypot(*(x.residual_norm for x in both)))
    assert found.num_entries == 2 * both[0].num_entries
    assert min(x.cosine for x in both) <= found.cosine <= 1
    assert found.singular_values[0] == max(x.singular_values[0] for x in both)


def test_a_run_writes_it_each_round(tiny_llama: Path, tmp_path: Path) -> None:
    run_config(write_config(tiny_llama, tmp_path), ["method.name=fedit"])
    for round in (1, 2):
        folder = tmp_path / "runs" / "run" / "server" / f"round-{round:04d}"
        tree = json.loads((folder / "deviation.json").read_text())
        report = json.loads((folder / "aggregate.json").read_text())
        assert [x["layer"] for x in tree["layers"]] == [x["layer"] for x in report["layers"]]
        for mine, other in zip(tree["layers"], report["layers"], strict=True):
            assert mine["ideal_norm"] == pytest.approx(other["ideal_norm"], rel=1e-6)
        assert 0 < tree["total"]["relative"] < 1


def test_many_clients_leave_it_out_by_name() -> None:
    tree = as_tree({"layer": None})
    assert (tree["total"], tree["layers"]) == (None, [])
    assert tree["note"].startswith("left out")
