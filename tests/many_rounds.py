"""Rounds without their training: clients are written as if they had been trained elsewhere.

Everything behind them is the real thing. The oracle reads the clients' factors and forms residuals
by definition, in float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from tiny import near, random_pairs, save_adapter

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import fold_targets
from fedex_scale.engine.lora_model import SIDE
from fedex_scale.engine.parameters import read_whole
from fedex_scale.federation import server
from fedex_scale.federation.client import show
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import Pair
from fedex_scale.run import engine_for
from fedex_scale.runtime import distributed

RANK, ALPHA, WEIGHTS = 8, 16, (0.5, 0.3, 0.2)
SCALING = ALPHA / RANK


@dataclass
class Rounds:
    """A run's rounds without its training."""

    config: Config
    engine: Engine
    run: RunDir
    state: ServerState = field(default_factory=ServerState)

    def __post_init__(self) -> None:
        self.targets = fold_targets(self.engine)
        self.base = self.weights()
        self.sums = {layer: torch.zeros_like(W) for layer, W in self.base.items()}
        self.before = dict(self.sums)

    def resumed(self) -> Rounds:
        """Return the same in a process of its own, as it were: all is read from disk anew."""
        config, run, state = self.config, self.run, self.state
        engine = engine_for(config, len(WEIGHTS))
        again = Rounds(config, engine, run)
        again.sums, again.state = self.sums, state
        server.refold(config, engine, again.targets, run, state)
        show(engine, run, state)
        again.before = {layer: W - again.base[layer] for layer, W in again.weights().items()}
        return again

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what each layer multiplies with besides the client adapter, (O, I), float64."""
        weights = {}
        for name, layer in self.engine.layers.items():
            W = read_whole(layer.get_base_layer().weight).double()
            W = W.T if layer.fan_in_fan_out else W
            if self.config.model.quantization != "none":
                W = torch.zeros(layer.out_features, layer.in_features).double()  # it stays packed
            if SIDE in self.engine.model.active_adapters:
                B = read_whole(layer.lora_B[SIDE].weight).double()
                if not self.engine.has_planes:
                    B = B @ read_whole(layer.lora_A[SIDE].weight).double()
                W = W + B
            weights[name] = W.clone()
        return weights

    def advance(self, clients: list[dict[str, Pair]]) -> tuple[dict, dict[str, float]]:
        """Do a round; return its report, and the shares kept by the oracle: of it, and of all."""
        number = self.state.round + 1
        if distributed.is_main():
            for k, pairs in enumerate(clients):
                save_adapter(self.run.client(number, k), pairs, alpha=ALPHA)
        distributed.barrier()
        self.state, _ = server.aggregate_round(
            self.config, self.engine, self.targets, range(3), WEIGHTS, self.run, self.state
        )
        show(self.engine, self.run, self.state)
        seen = self.weights()
        missed = intended = unseen = total = 0.0
        for layer, base in self.base.items():
            residual = dense_residual([pairs[layer] for pairs in clients])
            self.sums[layer] = self.sums[layer] + residual
            here = seen[layer] - base
            missed += (here - self.before[layer] - residual).norm().item() ** 2
            intended += residual.norm().item() ** 2
            unseen += (here - self.sums[layer]).norm().item() ** 2
            total += self.sums[layer].norm().item() ** 2
            self.before[layer] = here
        kept = {"round": 1 - (missed / intended) ** 0.5, "all": 1 - (unseen / total) ** 0.5}
        return json.loads((self.run.server(number) / "aggregate.json").read_text()), kept


def dense_residual(pairs: list[Pair]) -> torch.Tensor:
    """Return s (sum_k w_k B_k A_k - B A) by definition."""
    A = sum(w * pair.A_RI.double() for w, pair in zip(WEIGHTS, pairs, strict=True))
    B = sum(w * pair.B_OR.double() for w, pair in zip(WEIGHTS, pairs, strict=True))
    ideal = SCALING * sum(
        w * pair.B_OR.double() @ pair.A_RI.double() for w, pair in zip(WEIGHTS, pairs, strict=True)
    )
    return ideal - SCALING * B @ A


def rounds_of(base: Path, folder: Path, *overrides: str, rounds: int = 8) -> Rounds:
    sections = {
        "run": {"dir": str(folder)},
        "model": {"path": str(base), "dtype": "bfloat16"},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "data": {"path": "none.jsonl"},
        "federation": {"rounds": rounds},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    config = load_config(folder / "run.yaml", overrides)
    engine, run = engine_for(config, len(WEIGHTS)), RunDir(config.run.path)
    server.draw_adapter(config, engine, run)
    return Rounds(config, engine, run)


def drifting(rounds: Rounds, init: str, number: int) -> list[dict[str, Pair]]:
    """Return clients that went on from the server's adapter, or began with an A each."""
    start = Adapter(rounds.run.adapter(number - 1))
    pairs = {layer: start.pair(layer) for layer in start.layers}
    shapes = rounds.engine.shapes()
    if number == 1 and init == "per_client":
        return [random_pairs(shapes, rank=RANK, seed=100 + k) for k in range(3)]
    return [near(pairs, spread=0.02, seed=10 * number + k) for k in range(3)]


def assert_told(report: dict, kept: dict[str, float]) -> None:
    """The report does not overstate, and understates by no more than float32 rounds."""
    assert report["kept"] == pytest.approx(kept["round"], abs=2e-4)
    assert report["kept_of_all"] == pytest.approx(kept["all"], abs=2e-4)
