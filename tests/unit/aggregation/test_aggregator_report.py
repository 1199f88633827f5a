"""What a round reports of itself: how much was kept, what is worth a warning, who does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from layer_oracles import dense
from server_oracle import (
    BF16,
    FOLDS,
    RANK,
    SHAPES,
    Server,
    make_clients,
    mean,
    run_round,
    start,
)
from tiny import random_pairs, save_adapter

from fedex_scale.config.federation import AggregateSection
from fedex_scale.methods.algebra import LowRank, Pair
from fedex_scale.runtime.errors import UserError


@pytest.fixture
def previous() -> dict[str, Pair]:
    return start()


@pytest.mark.parametrize("spread", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("fold", FOLDS)
def test_kept_is_what_the_forward_pass_sees(
    tmp_path: Path, previous, fold: str, spread: float
) -> None:
    server = Server(BF16)
    before = {layer: server.base(layer).clone() for layer in SHAPES}
    clients, updates = make_clients(tmp_path, previous, spread=spread)
    report = run_round(
        server, tmp_path, clients, previous=previous, fold=fold, side_rank=3, side_dtype=BF16
    )
    missed, intended = 0.0, 0.0
    for line in report.layers:
        layer, ideal = line.layer, mean(updates[line.layer])
        # The float32 pair takes part in full; only the residual can be lost.
        residual = dense(server.residuals[layer])
        seen = server.base(layer, with_carry=False) - before[layer]
        if fold == "side":
            held = LowRank(*(factor.to(BF16) for factor in server.sides[layer]))
            seen = seen + dense([held])
        error = (seen - residual).norm().item()
        assert line.ideal_norm == pytest.approx(ideal.norm().item(), rel=1e-5)
        assert line.residual_norm == pytest.approx(residual.norm().item(), rel=1e-5)
        # Measured in float32, whose rounding of a weight is seen beside a residual 1e-6 of it.
        assert line.kept == pytest.approx(1 - error / residual.norm().item(), abs=5e-3)
        missed, intended = missed + error**2, intended + residual.norm().item() ** 2
    assert report.kept == pytest.approx(1 - math.sqrt(missed / intended), abs=5e-3)


@pytest.mark.parametrize("fold", ["round", "carry"])
def test_a_residual_that_bf16_rounds_away_is_warned_of(tmp_path: Path, previous, fold: str) -> None:
    clients, _ = make_clients(tmp_path, previous, spread=1e-3)
    report = run_round(Server(BF16), tmp_path, clients, previous=previous, fold=fold)
    assert report.kept < 0.1
    warning = report.warning(AggregateSection(fold=fold))
    assert f"only {max(0.0, report.kept):.1%} of this round's residual" in warning
    assert f"fold: {fold}" in warning
    assert "use fold: side, or take a float32 base" in warning
    assert report.summary(AggregateSection(fold=fold))["warning"] == warning


def test_report_is_json_and_names_the_largest_layer(tmp_path: Path, previous) -> None:
    clients, _ = make_clients(tmp_path, previous)
    report = run_round(Server(), tmp_path, clients, previous=previous)
    whole = json.loads(json.dumps(report.as_dict()))
    norms = {layer["layer"]: layer["residual_norm"] for layer in whole["layers"]}
    assert set(norms) == set(SHAPES)
    assert whole["largest_layer"] == max(norms, key=norms.get)
    assert whole["residual_norm"] == pytest.approx(math.hypot(*norms.values()))
    summary = report.summary(AggregateSection())
    assert summary["kept"] == report.kept
    assert summary["warning"] is None
    assert summary["notes"] == []


def altered_client(tmp_path: Path, kind: str, previous: dict[str, Pair]) -> Path:
    layer, *_ = SHAPES
    pairs, path = dict(previous), tmp_path / "client-0007"
    match kind:
        case "unknown layer":
            pairs["lm_head"] = Pair(torch.randn(RANK, 17), torch.randn(400, RANK))
        case "missing layer":
            del pairs[layer]
        case "rank":
            pairs = random_pairs(SHAPES, rank=RANK + 1, seed=0)
        case "shape":
            pairs[layer] = Pair(torch.randn(RANK, 16), pairs[layer].B_OR)
        case "NaN":
            pairs[layer] = Pair(pairs[layer].A_RI * math.nan, pairs[layer].B_OR)
    return save_adapter(path, pairs, alpha=2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unknown layer", "layer lm_head is not among the server's"),
        ("missing layer", "layer model.layers.0.q_proj is missing"),
        ("rank", f"rank {RANK + 1}, but the server has {RANK}; raise lora.rank"),
        ("shape", "layer model.layers.0.q_proj: expected shape (23, 17), got (23, 16)"),
        ("NaN", "layer model.layers.0.q_proj: expected finite numbers, got NaN or Inf in lora_A"),
    ],
)
def test_a_client_that_does_not_fit_is_named(
    tmp_path: Path, previous, kind: str, message: str
) -> None:
    server = Server()
    before = {layer: W.clone() for layer, W in server.weights.items()}
    clients, _ = make_clients(tmp_path, previous, num_clients=2)
    clients.append(altered_client(tmp_path, kind, previous))
    with pytest.raises(UserError) as caught:
        run_round(server, tmp_path, clients, previous=previous, fold="round")
    assert message in str(caught.value)
    assert "client-0007" in str(caught.value)
    if kind != "NaN":  # found when its layer's turn comes; all else before the first
        for layer in SHAPES:
            assert torch.equal(server.weights[layer], before[layer])
