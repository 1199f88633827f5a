"""What only a GPU would show: an operation on tensors of two devices, seen without one.

Run by tests/unit/test_devices.py, in a process of its own.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fake_gpu import GPU, WAITS, fake_gpu
from server_oracle import RANK, SCALING, SHAPES, make_clients, start
from tiny import SIZES, save_adapter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedex_scale.aggregation.aggregator import Round, Sinks, aggregate
from fedex_scale.aggregation.weights import Target, as_stats, fold
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.config.learning import EngineSection, LoraSection, ModelSection
from fedex_scale.data.batching import Examples, collate, pack
from fedex_scale.engine import build, contents, models, training
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.federation.client import take_factors
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods import ffa
from fedex_scale.methods.algebra import LowRank, Pair
from fedex_scale.methods.all import METHODS
from fedex_scale.tasks.interface import ModelKind


def test_a_mix_of_devices_is_seen() -> None:
    with fake_gpu() as gpu, pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device=gpu) + torch.ones(3)


@pytest.fixture(params=["llama", "gemma2"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    AutoConfig.for_model(request.param, **SIZES).to_json_file(path)
    return path


def new_base(
    section: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    ds_config: None,
    kind: ModelKind,
) -> PreTrainedModel:
    config = models.base_config(section)
    settings = {"dtype": dtype, "attn_implementation": models.attention(section, config)}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, **settings).requires_grad_(False)


def on_gpu(config: Path) -> Engine:
    engine = build_engine(
        ModelSection(config=str(config), random=True, dtype="bfloat16"),
        LoraSection(rank=3),
        EngineSection(),
        trains=frozenset("AB"),
        side_rank=6,
        optimizer="adamw",
        micro_batch_size=2,
        accumulation=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    assert {tensor.device for tensor in everything(engine)} == {GPU}
    return engine


def everything(engine: Engine) -> list[torch.Tensor]:
    return [*engine.model.parameters(), *engine.model.buffers()]


def factors_of(engine: Engine, rank: int) -> dict[str, Pair]:
    """Return factors as they come from a file: float32, on the CPU."""
    return {
        layer: Pair(torch.ones(rank, num_in), torch.ones(num_out, rank))
        for layer, (num_out, num_in) in engine.shapes().items()
    }


def four_examples() -> Examples:
    lengths = np.array([9, 7, 5, 8])
    return Examples(
        tokens=np.ones(lengths.sum(), dtype=np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=lengths // 2,
        rows=np.arange(4),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_waits_for_its_loss_and_nothing_else(config: Path, packed: bool) -> None:
    with fake_gpu(), patch.object(build, "load_base", new_base):
        engine, examples = on_gpu(config), four_examples()
        contents.set_side(engine, factors_of(engine, 6).__getitem__)
        training.reset_for_client(engine, factors_of(engine, 3).__getitem__, side=True)
        make = pack if packed else partial(collate, pad_id=0)
        batches = [make(examples, pair, fallback=0) for pair in ([0, 1], [2, 3])]
        training.train_step(engine, batches, units=15, lr=1e-3)
        WAITS.clear()
        training.train_step(engine, batches, units=15, lr=1e-3)
        assert WAITS == ["aten._local_scalar_dense.default"]


def test_clients_train_on_a_gpu_and_leave_it(config: Path) -> None:
    examples = four_examples()
    with fake_gpu(), patch.object(build, "load_base", new_base):
        engine = on_gpu(config)
        server = factors_of(engine, 3)
        for side in (False, True):
            contents.set_side(engine, factors_of(engine, 6).__getitem__)
            training.reset_for_client(engine, server.__getitem__, side=side)
            batches = [
                collate(examples, [0, 1], fallback=0, pad_id=0),
                pack(examples, [2, 3], fallback=0),
            ]
            training.train_step(engine, batches, units=15, lr=1e-3)
            moments = engine.optimizer.state.values()
            assert {state["exp_avg"].device for state in moments} == {GPU}
            assert {tensor.device for tensor in everything(engine)} == {GPU}
            taken = take_factors(engine, who="client")
            assert {x.device.type for pair in taken.values() for x in pair} == {"cpu"}
        with torch.no_grad():
            assert engine.model(input_ids=torch.ones(1, 5, device=GPU).long()).logits.device == GPU


@pytest.mark.parametrize("carry", [False, True])
def test_every_weight_takes_a_fold_where_it_lies_with_one_wait_for_all(
    config: Path, carry: bool
) -> None:
    with fake_gpu(), patch.object(build, "load_base", new_base):
        engine, found = on_gpu(config), []
        targets = contents.fold_targets(engine)
        WAITS.clear()
        for layer, target in targets.items():
            num_out, num_in = engine.shapes()[layer]
            piece = LowRank(torch.ones(num_out, 4, device=GPU), torch.ones(4, num_in, device=GPU))
            found.append(fold(target, [piece], carry=carry))
            assert target.carry is None or target.carry.device == GPU
        assert not WAITS
        assert len(as_stats(*found)) == len(targets) > 1
        assert len(WAITS) == 1, "one wait for the folds of all layers"


# The last has more clients than are held at once.
CASES = [*product(METHODS, ("side", "carry", "round"), [3]), ("fedex", "side", 129)]


@pytest.mark.parametrize(("method", "folded", "num_clients"), CASES)
def test_every_method_aggregates_on_a_gpu(
    method: str, folded: str, num_clients: int, tmp_path: Path
) -> None:
    previous = start()
    before = save_adapter(tmp_path / "previous", previous, alpha=SCALING * RANK)
    clients, _ = make_clients(tmp_path, previous, num_clients=3)
    clients = [clients[k % 3] for k in range(num_clients)]
    adapters: dict[str, Pair] = {}
    # A client's change of A counts as 1, as any number does.
    with fake_gpu(), patch.object(ffa, "A_TOLERANCE", 2):
        targets = {
            layer: Target(
                flat=torch.ones(shape, device=GPU, dtype=torch.bfloat16).view(-1), shape=shape
            )
            for layer, shape in SHAPES.items()
        }
        task = Round(
            clients=[Adapter(path) for path in clients],
            weights=[1 / num_clients] * num_clients,
            previous=Adapter(before),
            rank=RANK,
            scaling=SCALING,
            side_rank=8 if folded == "side" else 0,
        )
        aggregate(
            task,
            MethodConfig(name=method),
            AggregateSection(fold=folded),
            targets,
            Sinks(adapter=adapters.__setitem__),
            seed=lambda layer: 0,
            side_dtype=torch.bfloat16,
        )
    assert set(adapters) == set(SHAPES)
    assert {x.device for pair in adapters.values() for x in pair} == {GPU}
