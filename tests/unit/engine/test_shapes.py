"""The recipes' real models, without their weights: every projection adapted, counted and folded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.engine import lora_model, models
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import fold_targets
from fedex_scale.engine.lora_model import CLIENT
from fedex_scale.engine.models import CONFIGS
from fedex_scale.runtime.errors import UserError

R, SIDE_RANK = 32, 64
# Weights in all, as the hub says; layers; hidden size d, inner f, queries q, keys and values k.
FACTS = {
    "mistral-7b": (7_241_732_096, 32, 4096, 14336, 32 * 128, 8 * 128),
    "gemma2-9b": (9_241_705_984, 42, 3584, 14336, 16 * 256, 8 * 256),
    "llama32-3b": (3_212_749_824, 28, 3072, 8192, 24 * 128, 8 * 128),
}
TIED = {"mistral-7b": False, "gemma2-9b": True, "llama32-3b": True}


@pytest.fixture(params=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def wrapped(name: str):
    section = ModelSection(config=name, random=True)
    base = models.meta_model(section, models.base_config(section))
    base.requires_grad_(False)
    return lora_model.add_adapters(
        base, LoraSection(rank=R), trains=frozenset("AB"), side_rank=SIDE_RANK
    )


def shapes(name: str) -> dict[str, tuple[int, int]]:
    """Return (O, I) of the seven projections."""
    _, _, d, f, q, k = FACTS[name]
    attention = {"q_proj": (q, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, q)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {
        f"mlp.{n}": s for n, s in mlp.items()
    }


def test_every_projection_is_adapted_and_nothing_else(name: str) -> None:
    layers = lora_model.lora_layers(wrapped(name))
    expected = {
        f"model.layers.{i}.{n}": shape
        for i in range(FACTS[name][1])
        for n, shape in shapes(name).items()
    }
    assert {n: (x.out_features, x.in_features) for n, x in layers.items()} == expected


def test_parameters_are_as_many_as_counted_by_hand(name: str) -> None:
    total, num_layers, d, f, q, k = FACTS[name]
    model = wrapped(name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Each projection has R (in + out): q and o alike, k and v alike, and three of the MLP.
    assert trained == num_layers * R * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))
    side = num_layers * SIDE_RANK * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))
    assert sum(p.numel() for p in model.parameters()) == total + trained + side


def test_tied_weights_are_one_and_no_fold_reaches_them(name: str) -> None:
    model = wrapped(name)
    base = model.get_base_model()
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert tied == TIED[name]
    folded = {id(x.get_base_layer().weight) for x in lora_model.lora_layers(model).values()}
    assert len(folded) == 7 * FACTS[name][1]
    assert id(base.get_output_embeddings().weight) not in folded


def test_fold_targets_cover_every_layer(name: str) -> None:
    model = wrapped(name)
    engine = Engine(
        model=model,
        layers=lora_model.lora_layers(model),
        optimizer=None,
        trains=frozenset("AB"),
        max_grad_norm=1.0,
        side_rank=SIDE_RANK,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    targets = fold_targets(engine)
    assert {n: t.shape for n, t in targets.items()} == engine.shapes()
    assert all(target.is_whole and not target.transposed for target in targets.values())
    adapted = sum(o * i for o, i in shapes(name).values()) * FACTS[name][1]
    assert sum(target.numel for target in targets.values()) == adapted
    assert {p.shape for n, p in model.named_parameters() if f".{CLIENT}." in n} == {
        shape for o, i in shapes(name).values() for shape in ((R, i), (o, R))
    }


def test_a_model_of_the_hub_whose_config_comes_along_needs_no_hub() -> None:
    known = models.known_models()
    assert set(known.values()) == {path.stem for path in CONFIGS.glob("*.json")}
    for hub_id, name in known.items():
        there = models.base_config(ModelSection(path=hub_id), offline=True)
        here = models.base_config(ModelSection(config=name, random=True))
        assert there.to_dict() == here.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model.path: missing"),
        ({"config": "mistral-7b"}, "use it with random: true"),
        ({"config": "mistral-7b", "random": True, "path": "x"}, "without a path"),
        ({"path": "x", "random": True, "quantization": "nf4"}, "expected quantization: none"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSection(**settings)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "nobody"}', None])
def test_a_config_that_cannot_be_read_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"model\.config: |config.json: not valid") as caught:
        models.base_config(ModelSection(config=str(path), random=True))
    assert "\n" not in str(caught.value)
