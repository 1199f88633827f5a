"""One round from adapters on disk to base, side adapter and pair, against a dense float64 oracle.

Whatever the method and wherever the residual lives, what the forward pass applies must be the
base as it was plus the ideal update: the weighted mean of what the clients' own pairs add.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracles import WEIGHTS, dense, product, relative_error
from server_oracle import (
    BF16,
    FLOAT32,
    FOLDS,
    RANK,
    SCALING,
    SHAPES,
    Server,
    assert_exact,
    make_clients,
    mean,
    run_round,
    start,
)
from tiny import random_pairs, save_adapter

from fedex_scale.aggregation.ranks import base_update_rank, side_rank_of
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import Pair, normalise_weights

EXACT_FOLDS = [*((FLOAT32, fold) for fold in FOLDS), (BF16, "side"), (BF16, "carry")]


@pytest.fixture
def previous() -> dict[str, Pair]:
    return start()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "fold"), EXACT_FOLDS)
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedex"},
        {"name": "fedex", "assign": "reinit"},
        {"name": "fedex", "assign": "svd"},
        {"name": "flora"},
        {"name": "ffa"},
    ],
    ids=str,
)
def test_exact_methods_apply_the_ideal_update(
    tmp_path: Path, previous, dtype, method: dict, fold: str, transposed: bool
) -> None:
    server = Server(dtype, transposed)
    before = {layer: server.base(layer).clone() for layer in SHAPES}
    clients, updates = make_clients(tmp_path, previous, sharing_A=method["name"] == "ffa")
    report = run_round(
        server, tmp_path, clients, previous=previous, method=MethodConfig(**method), fold=fold
    )
    ideal = {layer: mean(updates[layer]) for layer in SHAPES}
    assert_exact(server, before, ideal)
    assert report.base_changed == (fold != "side" and method["name"] != "ffa")
    if dtype == FLOAT32 or fold == "side":
        assert report.kept == pytest.approx(1, abs=1e-6)
        assert report.warning(AggregateSection(fold=fold)) is None
    if fold == "side":
        for layer in SHAPES:
            assert torch.equal(server.base(layer), before[layer])
            assert server.targets[layer].carry is None


@pytest.mark.parametrize("fold", FOLDS)
def test_factors_that_are_sent_hold_the_same_update(tmp_path: Path, previous, fold: str) -> None:
    """What the residual sink gets, with the pair, is exact for the base as it was."""
    clients, updates = make_clients(tmp_path, previous)
    server = Server(BF16)
    run_round(server, tmp_path, clients, previous=previous, fold=fold)
    for layer in SHAPES:
        total = dense(server.residuals[layer]) + product(server.pairs[layer], SCALING)
        assert relative_error(total, mean(updates[layer])) < 1e-6
        assert sum(piece.V_PI.shape[0] for piece in server.residuals[layer]) == 2 * RANK


@pytest.mark.parametrize("fold", FOLDS)
def test_fedit_averages_the_factors_and_leaves_the_base(
    tmp_path: Path, previous, fold: str
) -> None:
    server = Server(BF16)
    before = {layer: W.clone() for layer, W in server.weights.items()}
    clients, _ = make_clients(tmp_path, previous)
    report = run_round(
        server, tmp_path, clients, previous=previous, method="fedit", fold=fold, side_rank=3
    )
    for layer, pair in server.pairs.items():
        pairs = [Adapter(client).pair(layer) for client in clients]
        for i in range(2):
            expected = mean([each[i].double() for each in pairs])
            torch.testing.assert_close(pair[i].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(server.weights[layer], before[layer])
    assert not server.sides
    assert not server.residuals
    assert (report.kept, report.base_changed, report.total("residual_norm")) == (1, False, 0)


def test_clients_of_any_rank_and_alpha(tmp_path: Path, previous) -> None:
    options = [
        {"rank": 2, "alpha": 3.0},
        {"rank": 4, "alpha": 1.0, "use_rslora": True},
        {"rank": 1, "alpha": 16.0, "dtype": BF16},
    ]
    clients, ideal = [], dict.fromkeys(SHAPES, 0)
    for k, option in enumerate(options):
        rank = option.pop("rank")
        pairs = random_pairs(SHAPES, rank=rank, seed=k)
        clients.append(save_adapter(tmp_path / f"client-{k}", pairs, **option))
        scaling = option["alpha"] / (math.sqrt(rank) if "use_rslora" in option else rank)
        for layer, pair in pairs.items():
            pair = Pair(*(factor.to(option.get("dtype", FLOAT32)) for factor in pair))
            ideal[layer] = ideal[layer] + WEIGHTS[k] * product(pair, scaling)
    server = Server()
    before = {layer: server.base(layer) for layer in SHAPES}
    run_round(server, tmp_path, clients, previous=previous)
    assert_exact(server, before, ideal)


@settings(max_examples=30)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    ranks=st.lists(st.integers(1, RANK), min_size=5, max_size=5),
    alphas=st.lists(st.floats(0.5, 32), min_size=5, max_size=5),
    method=st.sampled_from(["fedex", "flora"]),
    fold=st.sampled_from(["side", "carry"]),
    side_rank=st.integers(1, 20),
    dtype=st.sampled_from([FLOAT32, BF16]),
    transposed=st.booleans(),
)
def test_any_clients(weights, ranks, alphas, method, fold, side_rank, dtype, transposed) -> None:
    weight_K = normalise_weights(weights)
    server = Server(dtype, transposed)
    before = {layer: server.base(layer).clone() for layer in SHAPES}
    ideal = dict.fromkeys(SHAPES, 0)
    with tempfile.TemporaryDirectory() as scratch:
        clients = []
        for k, weight in enumerate(weight_K):
            pairs = random_pairs(SHAPES, rank=ranks[k], seed=k)
            clients.append(save_adapter(Path(scratch) / str(k), pairs, alpha=alphas[k]))
            for layer, pair in pairs.items():
                ideal[layer] = ideal[layer] + weight * product(pair, alphas[k] / ranks[k])
        run_round(
            server,
            Path(scratch),
            clients,
            previous=random_pairs(SHAPES, rank=RANK, seed=77),
            weights=weight_K,
            method=method,
            fold=fold,
            side_rank=side_rank,
        )
    assert_exact(server, before, ideal, tolerance=2e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("side_rank", [1, 5])
def test_what_overflows_the_side_adapter_goes_into_the_base(
    tmp_path: Path, previous, side_rank: int, dtype, transposed: bool
) -> None:
    """Three rounds, each with nothing known of those before; their sum stays exact."""
    server = Server(dtype, transposed)
    initial = {layer: server.base(layer).clone() for layer in SHAPES}
    residuals = dict.fromkeys(SHAPES, 0)
    for number in range(3):
        clients, updates = make_clients(tmp_path, previous)
        report = run_round(
            server, tmp_path, clients, previous=previous, side_rank=side_rank, fold="side"
        )
        assert report.base_changed
        for layer in SHAPES:
            assert server.sides[layer].V_PI.shape[0] == (number + 1) * side_rank
            residual = mean(updates[layer]) - product(server.pairs[layer], SCALING)
            residuals[layer] = residuals[layer] + residual
            total = residuals[layer] + product(server.pairs[layer], SCALING)
            error = server.applied(layer) - initial[layer] - total
            assert error.norm() < 2e-6 * total.norm()
        previous = server.pairs.copy()


def test_the_side_adapter_keeps_the_best_part(tmp_path: Path, previous) -> None:
    server = Server()
    clients, updates = make_clients(tmp_path, previous)
    run_round(server, tmp_path, clients, previous=previous, side_rank=3)
    for layer in SHAPES:
        residual = mean(updates[layer]) - product(server.pairs[layer], SCALING)
        left = residual - dense([server.sides[layer]])
        best = torch.linalg.svdvals(residual)[3:].norm().item()
        assert left.norm().item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
def test_identical_clients_leave_no_residual_and_change_no_weight(
    tmp_path: Path, previous, dtype, fold: str
) -> None:
    server = Server(dtype)
    before = {layer: W.clone() for layer, W in server.weights.items()}
    clients = [save_adapter(tmp_path / f"c{k}", previous, alpha=SCALING * RANK) for k in range(3)]
    report = run_round(server, tmp_path, clients, previous=previous, fold=fold)
    assert (report.kept, report.base_changed, report.total("residual_norm")) == (1, False, 0)
    for layer in SHAPES:
        assert torch.equal(server.weights[layer], before[layer])
        for got, expected in zip(server.pairs[layer], previous[layer], strict=True):
            assert torch.equal(got, expected)
        assert layer not in server.sides or not dense([server.sides[layer]]).any()


def test_a_second_run_gives_the_same_bits(tmp_path: Path, previous) -> None:
    clients, _ = make_clients(tmp_path, previous)
    servers = [Server(BF16), Server(BF16)]
    for server in servers:
        run_round(server, tmp_path, clients, previous=previous, method="flora", side_rank=2)
    one, two = servers
    for layer in SHAPES:
        assert torch.equal(one.weights[layer], two.weights[layer])
        assert torch.equal(one.pairs[layer].A_RI, two.pairs[layer].A_RI)
        assert torch.equal(one.sides[layer].U_OP, two.sides[layer].U_OP)


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ({"name": "fedex"}, 8),
        ({"name": "fedex", "svd_rank": 3}, 3),
        ({"name": "fedex", "svd_rank": 99}, 8),
        ({"name": "fedex", "assign": "reinit"}, 12),
        ({"name": "flora"}, 12),
        ({"name": "fedit"}, 0),
        ({"name": "ffa"}, 0),
        ({"name": "flexlora"}, 0),
        ({"name": "lora_fair"}, 0),
        ({"name": "centralized"}, 0),
    ],
    ids=str,
)
def test_rank_of_the_base_update(tmp_path: Path, previous, method: dict, rank: int) -> None:
    config = MethodConfig(**method)
    assert base_update_rank(config, 3, RANK) == rank
    server = Server()
    clients, _ = make_clients(tmp_path, previous, sharing_A=method["name"] == "ffa")
    run_round(server, tmp_path, clients, previous=previous, method=config)
    got = {sum(piece.V_PI.shape[0] for piece in pieces) for pieces in server.residuals.values()}
    assert got == ({rank} if rank else set())


def test_the_side_adapter_of_a_run_may_hold_all_rounds_up_to_512_columns() -> None:
    def most(method: MethodConfig, clients: int, rounds: int, **section: object) -> int:
        return side_rank_of(method, AggregateSection(**section), clients, 32, rounds)

    fedex = MethodConfig()
    assert most(fedex, 3, 1) == 64
    assert most(fedex, 3, 8) == 512
    assert most(fedex, 3, 9) == 512
    assert most(fedex, 3, 9, side_rank=600) == 600
    assert most(fedex, 1, 9) == 0
    assert most(fedex, 3, 2, fold="planes") == 0
    assert most(MethodConfig(name="fedit"), 3, 2) == 0
