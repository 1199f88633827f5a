"""An adapter that cannot be used is refused on one line that names it; a pickle is never loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_pairs, save_adapter

from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.runtime.errors import UserError

SHAPES = {"model.layers.0.q_proj": (23, 17), "model.layers.0.up_proj": (29, 17)}
CPU = torch.device("cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [0, 1])
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, bad: float, factor: int) -> None:
    pairs = random_pairs(SHAPES, rank=2, seed=0)
    pairs["model.layers.0.up_proj"][factor][1, 1] = bad
    adapter = Adapter(save_adapter(tmp_path / "client-0007", pairs, alpha=2))
    loaded = LayerPairs([adapter], "model.layers.0.up_proj", rank=2, scaling=1, device=CPU)
    with pytest.raises(UserError) as caught:
        loaded[0]
    for part in ("client-0007", "model.layers.0.up_proj", f"lora_{'AB'[factor]}", "NaN or Inf"):
        assert part in str(caught.value)


def damage(directory: Path, kind: str) -> None:
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    settings = json.loads(config.read_text())
    match kind:
        case "no directory":
            weights.unlink()
            config.unlink()
            directory.rmdir()
        case "no config":
            config.unlink()
        case "no JSON":
            config.write_text("{r: 2")
        case "no text":
            config.write_bytes(b"\xff\xfe\x00")
        case "a list":
            config.write_text("[1]")
        case "not LoRA":
            config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
        case "no rank":
            config.write_text(json.dumps({**settings, "r": 0}))
        case "no alpha":
            config.write_text(json.dumps({**settings, "lora_alpha": "big"}))
        case "alpha 0":
            config.write_text(json.dumps({**settings, "lora_alpha": 0}))
        case "no weights":
            weights.unlink()
        case "a pickle":
            torch.save(load_file(weights), directory / "adapter_model.bin")
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-5])
        case "empty":
            weights.write_bytes(b"")
        case "no LoRA":
            save_file({"base_model.model.score.weight": torch.ones(2)}, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no directory", "expected a PEFT adapter directory, found no adapter_config.json"),
        ("no config", "expected a PEFT adapter directory, found no adapter_config.json"),
        ("no JSON", "adapter_config.json: not valid JSON"),
        ("no text", "adapter_config.json: not valid JSON"),
        ("a list", "peft_type: expected LORA, got [1]"),
        ("not LoRA", "peft_type: expected LORA, got 'IA3'"),
        ("no rank", "r: expected at least 1, got 0"),
        ("no alpha", "lora_alpha: expected a number, got 'big'"),
        ("alpha 0", "lora_alpha: expected at least 0.000000000001, got 0"),
        ("no weights", "expected adapter_model.safetensors, found none"),
        ("a pickle", "expected adapter_model.safetensors, found none; save the adapter as saf"),
        ("truncated", "adapter_model.safetensors: damaged"),
        ("empty", "adapter_model.safetensors: damaged"),
        ("no LoRA", "expected LoRA weights, found none"),
    ],
)
def test_adapters_that_cannot_be_used(tmp_path: Path, kind: str, message: str) -> None:
    path = save_adapter(tmp_path / "client-0007", random_pairs(SHAPES, rank=2, seed=0), alpha=2)
    damage(path, kind)
    with pytest.raises(UserError) as caught:
        Adapter(path)
    assert message in str(caught.value)
    assert "client-0007" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("missing", "there"), [("A", "B"), ("B", "A")])
def test_a_factor_without_the_other_is_named(tmp_path: Path, missing: str, there: str) -> None:
    path = save_adapter(tmp_path / "client-0007", random_pairs(SHAPES, rank=2, seed=0), alpha=2)
    file, layer = path / "adapter_model.safetensors", "model.layers.0.up_proj"
    tensors = load_file(file)
    del tensors[f"base_model.model.{layer}.lora_{missing}.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        Adapter(path)
    assert f"client-0007, layer {layer}" in str(caught.value)
    assert f"found lora_{there} without lora_{missing}" in str(caught.value)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    path = save_adapter(tmp_path / "client-0007", random_pairs(SHAPES, rank=2, seed=0), alpha=2)
    file, layer = path / "adapter_model.safetensors", "model.layers.0.up_proj"
    tensors = load_file(file)
    for name in "AB":
        del tensors[f"base_model.model.{layer}.lora_{name}.weight"]
    save_file(tensors, file)
    adapter = Adapter(path)
    for read in (adapter.pair, adapter.shapes):
        with pytest.raises(UserError) as caught:
            read(layer)
        assert f"client-0007: layer {layer} is missing" in str(caught.value)
