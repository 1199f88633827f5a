"""A layer's products as one function: the gradients of PEFT's way, in fewer operations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import logits
from torch import Tensor

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.engine import lora_model, models
from fedex_scale.engine.fused import FusedLinear, stacks_held
from fedex_scale.engine.lora_model import CLIENT, SIDE

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

AB, ONLY_B = frozenset("AB"), frozenset("B")


def build(
    path: Path,
    *,
    fused: bool,
    adapters: tuple[str, ...] = (CLIENT, SIDE),
    trains: frozenset[str] = AB,
    planes: bool = False,
    dtype: torch.dtype = torch.float32,
    **lora: object,
):
    """A model with two adapters that are not zero; the same whether fused or not."""
    base = models.load_model(ModelSection(path=str(path)), dtype, torch.device("cpu"))
    section = LoraSection(**{"rank": 3, "alpha": 6, **lora})
    model = lora_model.add_adapters(base, section, trains=trains, side_rank=5, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_model.lora_layers(model).values():
        if planes:
            plane = lora_model.make_plane(layer)
            plane.data = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
        for factors in (layer.lora_A, layer.lora_B):
            for factor in factors.values():
                factor.weight.data.normal_(0, 0.1, generator=generator)
    lora_model.activate(model, list(adapters), trains=trains)
    return model.train()


def train(model, *, micro_batches: int = 2, steps: int = 2) -> Iterator[dict[str, Tensor]]:
    """Train with plain SGD; yield the gradients of each step, by parameter."""
    layers, dtype = lora_model.lora_layers(model).values(), model.dtype
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    for step in range(steps):
        with stacks_held(layers, dtype):
            for part in range(micro_batches):
                tokens = torch.arange(5 + part, 25 + part)[None] + 7 * step
                model(input_ids=tokens, labels=tokens).loss.backward()
        yield {name: p.grad.clone() for name, p in trained.items()}
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.02 * parameter.grad
                parameter.grad = None


CASES = {
    "client alone": {"adapters": (CLIENT,)},
    "client and side": {},
    "only B trains": {"trains": ONLY_B},
    "rank-stabilised": {"use_rslora": True},
    "planes": {"planes": True},
    "dropout": {"dropout": 0.3},
    "dropout, client alone": {"dropout": 0.3, "adapters": (CLIENT,)},
    "output layer": {"target_modules": ("q_proj", "lm_head")},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_peft(tiny_llama: Path, case: dict, checkpointing: bool) -> None:
    seen = []
    for fused in (True, False):
        model = build(tiny_llama, fused=fused, **case)
        used = {type(x) is FusedLinear for x in lora_model.lora_layers(model).values()}
        assert used == {fused}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        seen.append(list(train(model)))
    assert seen[0][0].keys() == seen[1][0].keys()
    for ours, theirs in zip(*seen, strict=True):
        for name, gradient in ours.items():
            error = (gradient - theirs[name]).norm() / theirs[name].norm()
            assert error < 5e-6, (name, error)
        mine, other = (torch.cat([g.flatten() for g in x.values()]) for x in (ours, theirs))
        assert (mine - other).norm() / other.norm() < 1e-6


def test_scores_are_those_of_peft_to_the_bit(tiny_llama: Path) -> None:
    fused, usual = (build(tiny_llama, fused=fused).eval() for fused in (True, False))
    assert torch.equal(logits(fused), logits(usual))


def test_without_a_step_factors_are_seen_as_they_are(tiny_llama: Path) -> None:
    model = build(tiny_llama, fused=True)
    tokens = torch.arange(5, 25)[None]
    with stacks_held(lora_model.lora_layers(model).values(), torch.float32):
        before = model(input_ids=tokens).logits
    for layer in lora_model.lora_layers(model).values():
        layer.lora_B[SIDE].weight.data.zero_()
    assert not torch.equal(model(input_ids=tokens).logits, before)


def test_gradients_add_up_in_float32_over_a_bf16_step(tiny_llama: Path) -> None:
    """They are computed in bf16 for each micro-batch, and summed in float32."""
    model = build(tiny_llama, fused=True, dtype=torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = []
    for part in range(3):
        tokens = torch.arange(5 + part, 25 + part)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        alone.append([p.grad.clone() for p in trained])
        model.zero_grad(set_to_none=True)
    for part in range(3):
        tokens = torch.arange(5 + part, 25 + part)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
    for parameter, *parts in zip(trained, *alone, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, parts[0] + parts[1] + parts[2])


def test_a_layer_that_is_no_plain_matrix_is_left_to_peft(tiny_gpt2: Path) -> None:
    layers = lora_model.lora_layers(build(tiny_gpt2, fused=True)).values()
    assert not any(isinstance(layer, FusedLinear) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_mistral_layer_starts_few_operations(dtype: torch.dtype) -> None:
    from launches import launches

    usual = launches(dtype, [CLIENT, SIDE], fused=False)
    forward, backward = launches(dtype, [CLIENT, SIDE], fused=True)
    assert forward <= 52 < usual[0]
    assert backward <= 100 < usual[1]
    assert (forward, backward) == launches(dtype, [CLIENT], fused=True)
