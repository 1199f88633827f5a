"""Two rounds with clients that were trained elsewhere, and dense oracles of what they leave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from layer_oracles import WEIGHTS, product
from peft import PeftModel
from tiny import logits, near, save_adapter
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import fold_targets
from fedex_scale.federation import server
from fedex_scale.federation.client import show
from fedex_scale.federation.final import write_final
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.run import engine_for

RANK, ALPHA = 3, 6


@dataclass
class Run:
    config: Config
    engine: Engine
    directory: RunDir
    state: ServerState
    updates: dict[str, torch.Tensor]
    """What two rounds add to each layer, as (O, I), float64: the oracle."""

    def write_final(self) -> dict[str, Path]:
        return write_final(self.config, self.engine, self.directory, self.state)


def two_rounds(base: Path, tmp_path: Path, *overrides: str) -> Run:
    """Do two rounds with clients that were trained elsewhere, as it were."""
    config_file = tmp_path / "run.yaml"
    sections = {
        "run": {"dir": str(tmp_path)},
        "model": {"path": str(base), "dtype": "float32"},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "data": {"path": "none.jsonl"},
    }
    config_file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    config = load_config(config_file, overrides)
    engine, directory = engine_for(config, len(WEIGHTS)), RunDir(config.run.path)
    run = Run(config, engine, directory, ServerState(), dict.fromkeys(engine.layers, 0))
    server.draw_adapter(config, engine, directory)
    show(engine, directory, run.state)
    targets = fold_targets(engine)
    for number in (1, 2):
        ideal = write_clients(run, number)
        run.state, _ = server.aggregate_round(
            config, engine, targets, range(len(WEIGHTS)), WEIGHTS, directory, run.state
        )
        show(engine, directory, run.state)
        mean = Adapter(directory.adapter(number))
        for layer in engine.layers:
            run.updates[layer] += ideal[layer]
            if number == 1:  # its clients went on from the mean pair
                run.updates[layer] -= product(mean.pair(layer), mean.scaling)
    return run


def write_clients(run: Run, number: int) -> dict[str, torch.Tensor]:
    """Write the clients of a round, near the server's adapter; return the ideal update."""
    start = Adapter(run.directory.adapter(number - 1))
    pairs, ideal = {layer: start.pair(layer) for layer in start.layers}, {}
    for client, weight in enumerate(WEIGHTS):
        trained = near(pairs, spread=0.05, seed=10 * number + client)
        save_adapter(run.directory.client(number, client), trained, alpha=ALPHA)
        for layer, pair in trained.items():
            ideal[layer] = ideal.get(layer, 0) + weight * product(pair, ALPHA / RANK)
    return ideal


def load(base: Path, adapter: Path | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def dense_model(base: Path, updates: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer, delta_OI in updates.items():
        module = model.get_submodule(layer)
        delta = delta_OI.T if isinstance(module, Conv1D) else delta_OI
        module.weight.data.copy_(module.weight.double() + delta)
    return model


def assert_same_logits(got: torch.nn.Module, expected: torch.nn.Module, tolerance: float) -> None:
    got, expected = logits(got), logits(expected)
    assert (got - expected).norm() <= tolerance * expected.norm()
