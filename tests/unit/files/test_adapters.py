"""Adapters on disk: what is written, PEFT loads; what cannot be used is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from layer_oracles import product
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import logits, near, random_pairs, save_adapter
from transformers import AutoModelForCausalLM

from fedex_scale.config.learning import LoraSection
from fedex_scale.files.adapter_writers import AdapterWriter, write_joined
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.files.tensorfile import SafetensorsWriter
from fedex_scale.methods.algebra import LowRank, Pair

SHAPES = {"model.layers.0.q_proj": (23, 17), "model.layers.0.up_proj": (29, 17)}
LLAMA = {
    f"model.layers.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (64, 48),
        "self_attn.v_proj": (32, 48),
        "mlp.down_proj": (48, 112),
    }.items()
}
GPT2 = {
    f"transformer.h.{i}.{name}": shape
    for i in range(2)
    for name, shape in {"attn.c_attn": (144, 48), "mlp.c_fc": (112, 48)}.items()
}
CPU = torch.device("cpu")


def write(directory: Path, pairs: Mapping[str, Pair], *, alpha: float, **options: object) -> Path:
    shapes = {layer: (B.shape[0], A.shape[1]) for layer, (A, B) in pairs.items()}
    rank = next(iter(pairs.values())).A_RI.shape[0]
    options = {"rank": rank, "alpha": alpha, "base": "the/base", **options}
    with AdapterWriter(directory, shapes, **options) as writer:
        for layer in reversed(pairs):
            writer.write(layer, pairs[layer])
    return directory


def peft_logits(base: Path, *adapters: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for i, adapter in enumerate(adapters):
        if i == 0:
            model = PeftModel.from_pretrained(model, adapter, adapter_name="0")
        else:
            model.load_adapter(adapter, adapter_name=str(i))
    if adapters:
        model.base_model.set_adapter([str(i) for i in range(len(adapters))])
    return logits(model)


def dense_logits(
    base: Path, pairs: Mapping[str, Pair], scaling: float, transposed: bool = False
) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for layer, pair in pairs.items():
        weight, delta_OI = model.get_submodule(layer).weight, product(pair, scaling)
        weight.data += (delta_OI.T if transposed else delta_OI).float()
    return logits(model)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_is_written(tiny_llama: Path, tmp_path: Path, rslora: bool) -> None:
    pairs = random_pairs(LLAMA, rank=5, seed=0, size=0.2)
    path = write(tmp_path / "a", pairs, alpha=3, use_rslora=rslora)
    scaling = 3 / math.sqrt(5) if rslora else 3 / 5
    got, expected = peft_logits(tiny_llama, path), dense_logits(tiny_llama, pairs, scaling)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - peft_logits(tiny_llama)).abs().max() > 0.1


def test_peft_loads_what_is_written_for_conv1d(tiny_gpt2: Path, tmp_path: Path) -> None:
    pairs = random_pairs(GPT2, rank=5, seed=0, size=0.2)
    path = write(tmp_path / "a", pairs, alpha=3, fan_in_fan_out=True)
    expected = dense_logits(tiny_gpt2, pairs, 3 / 5, transposed=True)
    torch.testing.assert_close(peft_logits(tiny_gpt2, path), expected, rtol=1e-5, atol=1e-5)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    pairs = random_pairs(SHAPES, rank=4, seed=0)
    adapter = Adapter(write(tmp_path / "a", pairs, alpha=6))
    assert (adapter.rank, adapter.scaling) == (4, 1.5)
    assert set(adapter.layers) == set(SHAPES)
    for layer, pair in pairs.items():
        assert adapter.shapes(layer) == SHAPES[layer]
        for got, expected in zip(adapter.pair(layer), pair, strict=True):
            assert torch.equal(got, expected)
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * len(SHAPES)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == [
        "q_proj",
        "up_proj",
    ]


def test_a_sum_is_written_as_one_pair_filled_up_with_zeros(tmp_path: Path) -> None:
    first, second = (random_pairs(SHAPES, rank=2, seed=seed) for seed in (0, 1))
    with AdapterWriter(tmp_path / "a", SHAPES, rank=7, alpha=7, base="b") as writer:
        for layer in SHAPES:
            pieces = (LowRank(pairs[layer].B_OR, pairs[layer].A_RI) for pairs in (first, second))
            writer.write_sum(layer, pieces)
    adapter = Adapter(tmp_path / "a")
    for layer in SHAPES:
        expected = product(first[layer]) + product(second[layer])
        torch.testing.assert_close(product(adapter.pair(layer)), expected)


def test_a_layer_that_was_never_written_is_our_own_bug(tmp_path: Path) -> None:
    pairs = random_pairs(SHAPES, rank=2, seed=0)
    with (
        pytest.raises(AssertionError, match="never written"),
        AdapterWriter(tmp_path / "a", SHAPES, rank=2, alpha=2, base="b") as writer,
    ):
        writer.write("model.layers.0.q_proj", pairs["model.layers.0.q_proj"])


def test_streamed_safetensors_hold_what_the_library_writes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=draw),
        "b": torch.randn(7, generator=draw).bfloat16(),
        "c": torch.randn(2, 3, 4, generator=draw).half(),
        "d": torch.randn(()),
        "e": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "library.safetensors")
    specs = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    with SafetensorsWriter(tmp_path / "ours.safetensors", specs) as writer:
        for name in "ecadb":
            writer.write(name, tensors[name])
    ours, library = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "library"))
    assert list(ours) == list(tensors)
    for name, tensor in library.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_written_in_the_dtype_of_the_file_and_from_any_layout(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    with SafetensorsWriter(tmp_path / "x", {"x": (torch.bfloat16, (6, 4))}) as writer:
        writer.write("x", x.T)
    assert torch.equal(load_file(tmp_path / "x")["x"], x.T.bfloat16())


def test_pairs_of_a_layer_are_aligned(tmp_path: Path) -> None:
    """A client of lower rank, another alpha, or rsLoRA keeps what it does to the weight."""
    layer = "model.layers.0.q_proj"
    settings = [(2, 6.0, {}), (4, 1.0, {"use_rslora": True}), (3, 16.0, {})]
    adapters, expected = [], []
    for k, (rank, alpha, options) in enumerate(settings):
        pairs = random_pairs(SHAPES, rank=rank, seed=k)
        adapters.append(Adapter(save_adapter(tmp_path / str(k), pairs, alpha=alpha, **options)))
        scaling = alpha / math.sqrt(rank) if options else alpha / rank
        expected.append(product(pairs[layer], scaling))
    loaded = LayerPairs(adapters, layer, rank=4, scaling=0.25, device=CPU)
    assert len(loaded) == 3
    for pair, delta_OI in zip(loaded, expected, strict=True):
        assert pair.A_RI.shape == (4, 17)
        assert pair.B_OR.shape == (23, 4)
        torch.testing.assert_close(product(pair, 0.25), delta_OI, rtol=1e-6, atol=1e-6)


def test_clients_alike_are_not_touched_by_aligning(tmp_path: Path) -> None:
    pairs = random_pairs(SHAPES, rank=3, seed=0)
    adapter = Adapter(save_adapter(tmp_path / "a", pairs, alpha=1.0, dtype=torch.bfloat16))
    layer = "model.layers.0.up_proj"
    (pair,) = LayerPairs([adapter], layer, rank=3, scaling=1 / 3, device=CPU)
    for got, factor in zip(pair, pairs[layer], strict=True):
        assert torch.equal(got, factor.bfloat16().float())


def test_joined_adapters_do_what_they_do_together(tiny_llama: Path, tmp_path: Path) -> None:
    first = random_pairs(LLAMA, rank=3, seed=0, size=0.2)
    paths = [
        save_adapter(tmp_path / "0", first, alpha=2),
        save_adapter(tmp_path / "1", near(first, spread=0.1, seed=1), alpha=5, use_rslora=True),
        save_adapter(tmp_path / "2", random_pairs(LLAMA, rank=7, seed=2, size=0.2), alpha=7),
    ]
    joined = tmp_path / "joined"
    write_joined(joined, [Adapter(path) for path in paths], base=str(tiny_llama))
    adapter = Adapter(joined)
    assert (adapter.rank, adapter.scaling) == (13, 1)
    got, expected = peft_logits(tiny_llama, joined), peft_logits(tiny_llama, *paths)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_joined_adapters_for_conv1d(tiny_gpt2: Path, tmp_path: Path) -> None:
    paths = [
        write(
            tmp_path / str(k),
            random_pairs(GPT2, rank=k + 2, seed=k, size=0.2),
            alpha=3,
            fan_in_fan_out=True,
        )
        for k in range(2)
    ]
    joined = tmp_path / "joined"
    write_joined(joined, [Adapter(path) for path in paths], base="b", fan_in_fan_out=True)
    got, expected = peft_logits(tiny_gpt2, joined), peft_logits(tiny_gpt2, *paths)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 0.5), (True, 16 / math.sqrt(32))])
def test_section_scaling(rslora: bool, scaling: float) -> None:
    assert LoraSection(use_rslora=rslora).scaling == scaling
