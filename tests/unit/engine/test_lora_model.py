"""The base model with its two adapters: which layers they take, what trains, and in which dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import SIZES, logits
from transformers import AutoConfig, AutoModelForCausalLM

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.engine import lora_model, models
from fedex_scale.engine.lora_model import CLIENT, SIDE
from fedex_scale.runtime.errors import UserError

CPU = torch.device("cpu")
PROJECTIONS = {
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
}
GPT2_PROJECTIONS = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
AB, B = frozenset("AB"), frozenset("B")


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: object):
    return models.load_model(ModelSection(path=str(path), **settings), dtype, CPU)


def wrap(path: Path, *, trains: frozenset[str] = AB, side_rank: int = 5, **lora: object):
    section = LoraSection(**{"rank": 3, "alpha": 6, **lora})
    return lora_model.add_adapters(load(path), section, trains=trains, side_rank=side_rank)


def test_all_linear_is_the_seven_projections(tiny_llama: Path) -> None:
    layers = lora_model.lora_layers(wrap(tiny_llama))
    assert set(layers) == {f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


def test_all_linear_is_every_conv1d_of_gpt2(tiny_gpt2: Path) -> None:
    layers = lora_model.lora_layers(wrap(tiny_gpt2))
    expected = {f"transformer.h.{i}.{name}" for i in range(2) for name in GPT2_PROJECTIONS}
    assert set(layers) == expected
    assert all(layer.fan_in_fan_out for layer in layers.values())


@pytest.mark.parametrize("names", ["v_proj", ("v_proj",), ("q_proj", "v_proj")], ids=str)
def test_named_modules(tiny_llama: Path, names: str | tuple[str, ...]) -> None:
    layers = lora_model.lora_layers(wrap(tiny_llama, target_modules=names))
    suffixes = {name.rpartition(".")[2] for name in layers}
    assert suffixes == ({names} if isinstance(names, str) else set(names))
    assert len(layers) == 2 * len(suffixes)


def test_a_layer_whose_weight_is_the_embeddings_is_known(tiny_llama: Path, tiny_gpt2: Path) -> None:
    assert lora_model.tied_layers(wrap(tiny_gpt2, target_modules=("c_attn", "lm_head"))) == [
        "lm_head"
    ]
    assert lora_model.tied_layers(wrap(tiny_gpt2)) == []
    assert lora_model.tied_layers(wrap(tiny_llama, target_modules=("q_proj", "lm_head"))) == []


@pytest.mark.parametrize("names", ["query", ("query", "value"), ("q_proj", "query")], ids=str)
def test_names_that_match_nothing_are_told_what_there_is(tiny_llama: Path, names) -> None:
    with pytest.raises(UserError) as caught:
        wrap(tiny_llama, target_modules=names)
    message = str(caught.value)
    assert message.startswith("lora.target_modules: expected names of modules in llama, got")
    assert "which match nothing; choose from " in message
    for name in ("query", *(name.rpartition(".")[2] for name in PROJECTIONS)):
        assert name in message


def test_experts_that_share_a_tensor_are_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES))
    with pytest.raises(UserError, match="of mixtral, which holds several experts"):
        lora_model.add_adapters(model, LoraSection(), trains=AB)


@pytest.mark.parametrize(
    ("settings", "scaling"), [({}, 2.0), ({"use_rslora": True}, 6 / 3**0.5)], ids=str
)
def test_ranks_and_scalings(tiny_llama: Path, settings: dict, scaling: float) -> None:
    for layer in lora_model.lora_layers(wrap(tiny_llama, **settings)).values():
        num_out, num_in = layer.out_features, layer.in_features
        assert layer.lora_A[CLIENT].weight.shape == (3, num_in)
        assert layer.lora_B[CLIENT].weight.shape == (num_out, 3)
        assert layer.lora_A[SIDE].weight.shape == (5, num_in)
        assert layer.lora_B[SIDE].weight.shape == (num_out, 5)
        assert layer.scaling[CLIENT] == pytest.approx(scaling)
        assert layer.scaling[SIDE] == 1


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("trains", [AB, B], ids=["AB", "B"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_only_the_clients_factors_train(request, model: str, trains, side: bool) -> None:
    peft_model = wrap(request.getfixturevalue(model), trains=trains)
    for _ in range(2):  # round after round, whatever was set before
        lora_model.activate(peft_model, [CLIENT] if side else [CLIENT, SIDE], trains=AB)
        lora_model.activate(peft_model, [CLIENT, SIDE] if side else [CLIENT], trains=trains)
        trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
        assert trainable == {
            f"base_model.model.{layer}.lora_{factor}.{CLIENT}.weight"
            for layer in lora_model.lora_layers(peft_model)
            for factor in trains
        }
        for layer in lora_model.lora_layers(peft_model).values():
            assert list(layer.active_adapters) == ([CLIENT, SIDE] if side else [CLIENT])


def test_the_side_adapter_is_seen_when_it_is_active_only(tiny_llama: Path) -> None:
    model = wrap(tiny_llama)
    plain = logits(load(tiny_llama))
    for layer in lora_model.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B[SIDE].weight)
    lora_model.activate(model, [CLIENT], trains=AB)
    torch.testing.assert_close(logits(model), plain)
    lora_model.activate(model, [CLIENT, SIDE], trains=AB)
    assert (logits(model) - plain).abs().max() > 0.1


def test_adapters_train_in_the_dtype_of_the_base(tiny_llama: Path) -> None:
    """PEFT would make every layer's input float32 for a float32 adapter, and keep it."""
    model = lora_model.add_adapters(
        load(tiny_llama, torch.bfloat16),
        LoraSection(rank=3),
        trains=AB,
        side_rank=5,
        fused=False,
    ).train()
    lora_model.activate(model, [CLIENT, SIDE], trains=AB)
    seen = set()
    for layer in lora_model.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B[CLIENT].weight)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.register_forward_hook(
                lambda module, inputs, out: seen.add((inputs[0].dtype, out.dtype))
            )
    tokens = torch.arange(5, 25)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    for name, parameter in model.named_parameters():
        is_client = f".{CLIENT}." in name
        assert parameter.dtype == (torch.float32 if is_client else torch.bfloat16), name
        if is_client:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_score_as_pefts_own_do(tiny_llama: Path, dtype: torch.dtype) -> None:
    ours = lora_model.add_adapters(load(tiny_llama, dtype), LoraSection(rank=3), trains=AB).eval()
    theirs = get_peft_model(load(tiny_llama, dtype), ours.peft_config[CLIENT]).eval()
    layers = (lora_model.lora_layers(model).values() for model in (ours, theirs))
    for layer, other in zip(*layers, strict=True):
        torch.nn.init.normal_(layer.lora_B[CLIENT].weight)
        other.load_state_dict(layer.state_dict(), strict=False)  # theirs has no side adapter
        assert other.lora_B[CLIENT].weight.dtype == torch.float32
    assert torch.equal(logits(ours), logits(theirs))
