"""The base model with its two adapters: which layers they take, what trains, and in which dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import logits
from transformers import AutoModelForCausalLM

from fedex_scale import models
from fedex_scale.adapters import LoraSection
from fedex_scale.errors import UserError
from fedex_scale.models import CLIENT, SIDE, ModelSection

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
    return models.add_adapters(load(path), section, trains=trains, side_rank=side_rank)


def test_all_linear_is_the_seven_projections(tiny_llama: Path) -> None:
    layers = models.lora_layers(wrap(tiny_llama))
    assert set(layers) == {f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


def test_all_linear_is_every_conv1d_of_gpt2(tiny_gpt2: Path) -> None:
    layers = models.lora_layers(wrap(tiny_gpt2))
    expected = {f"transformer.h.{i}.{name}" for i in range(2) for name in GPT2_PROJECTIONS}
    assert set(layers) == expected
    assert all(layer.fan_in_fan_out for layer in layers.values())


@pytest.mark.parametrize("names", ["v_proj", ("v_proj",), ("q_proj", "v_proj")], ids=str)
def test_named_modules(tiny_llama: Path, names: str | tuple[str, ...]) -> None:
    layers = models.lora_layers(wrap(tiny_llama, target_modules=names))
    suffixes = {name.rpartition(".")[2] for name in layers}
    assert suffixes == ({names} if isinstance(names, str) else set(names))
    assert len(layers) == 2 * len(suffixes)


@pytest.mark.parametrize("names", ["query", ("query", "value"), ("q_proj", "query")], ids=str)
def test_names_that_match_nothing_are_told_what_there_is(tiny_llama: Path, names) -> None:
    with pytest.raises(UserError) as caught:
        wrap(tiny_llama, target_modules=names)
    message = str(caught.value)
    assert message.startswith("lora.target_modules: expected names of modules in llama, got")
    assert "which match nothing; choose from " in message
    for name in ("query", *(name.rpartition(".")[2] for name in PROJECTIONS)):
        assert name in message


@pytest.mark.parametrize(
    ("settings", "scaling"), [({}, 2.0), ({"use_rslora": True}, 6 / 3**0.5)], ids=str
)
def test_ranks_and_scalings(tiny_llama: Path, settings: dict, scaling: float) -> None:
    for layer in models.lora_layers(wrap(tiny_llama, **settings)).values():
        num_out, num_in = layer.out_features, layer.in_features
        assert layer.lora_A[CLIENT].weight.shape == (3, num_in)
        assert layer.lora_B[CLIENT].weight.shape == (num_out, 3)
        assert layer.lora_A[SIDE].weight.shape == (5, num_in)
        assert layer.lora_B[SIDE].weight.shape == (num_out, 5)
        assert layer.scaling[CLIENT] == pytest.approx(scaling)
        assert layer.scaling[SIDE] == 1


def test_no_side_adapter_where_nothing_goes_there(tiny_llama: Path) -> None:
    model = wrap(tiny_llama, side_rank=0)
    assert set(model.peft_config) == {CLIENT}
    assert not any(f".{SIDE}." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("trains", [AB, B], ids=["AB", "B"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_only_the_clients_factors_train(request, model: str, trains, side: bool) -> None:
    peft_model = wrap(request.getfixturevalue(model), trains=trains)
    for _ in range(2):  # round after round, whatever was set before
        models.activate(peft_model, trains=AB, side=not side)
        models.activate(peft_model, trains=trains, side=side)
        trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
        assert trainable == {
            f"base_model.model.{layer}.lora_{factor}.{CLIENT}.weight"
            for layer in models.lora_layers(peft_model)
            for factor in trains
        }
        for layer in models.lora_layers(peft_model).values():
            assert list(layer.active_adapters) == ([CLIENT, SIDE] if side else [CLIENT])


def test_the_side_adapter_is_seen_when_it_is_active_only(tiny_llama: Path) -> None:
    model = wrap(tiny_llama)
    plain = logits(load(tiny_llama))
    for layer in models.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B[SIDE].weight)
    models.activate(model, trains=AB, side=False)
    torch.testing.assert_close(logits(model), plain)
    models.activate(model, trains=AB, side=True)
    assert (logits(model) - plain).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_frozen_in_the_dtype_asked_for(tiny_llama: Path, dtype: torch.dtype) -> None:
    model = load(tiny_llama, dtype)
    stored = {}
    for file in tiny_llama.glob("*.safetensors"):
        stored.update(load_file(file))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        assert torch.equal(parameter, stored[name].to(dtype)), name


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_largest_weight_is_known_without_loading(request, model: str) -> None:
    path = request.getfixturevalue(model)
    largest = max(parameter.numel() for parameter in load(path).parameters())
    assert models.largest_weight(ModelSection(path=str(path))) == largest


@pytest.mark.parametrize(
    ("capabilities", "cuda", "expected"),
    [
        ({}, False, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, False, torch.float32),
        ({"avx512_bf16": True}, False, torch.bfloat16),
        ({"amx_bf16": True}, False, torch.bfloat16),
        ({}, True, torch.bfloat16),
    ],
)
def test_auto_dtype_is_bfloat16_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, cuda: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert models.resolve_dtype(ModelSection(path="x")) == expected


def test_one_line_says_so_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level("INFO", logger="fedex_scale"):
        models.resolve_dtype(ModelSection(path="x"))
    assert caplog.messages == ["model.dtype: float32, as this CPU has no fast bfloat16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_by_name(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert models.resolve_dtype(ModelSection(path="x", dtype=name)) == dtype


@pytest.mark.parametrize(
    ("setting", "model_type", "expected"),
    [
        ("auto", "llama", "sdpa"),
        ("auto", "gemma2", "eager"),
        ("eager", "llama", "eager"),
        ("flash_attention_2", "gemma2", "flash_attention_2"),
    ],
)
def test_attention(setting: str, model_type: str, expected: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    section = ModelSection(path="x", attention=setting)
    assert models.attention(section, config) == expected


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "models/of/mine"])
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_missing_model_directory_is_named(path: str, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        load_part(path, kind)
    assert f"model.path: expected a model directory or a hub id, got {path}" in str(caught.value)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_directory_without_a_model_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=r"which has no config\.json"):
        load_part(str(tmp_path), kind)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_hub_id_that_cannot_be_had_is_one_line(kind: str) -> None:
    with pytest.raises(UserError, match=r"model\.path: cannot load nobody/nothing: ") as caught:
        load_part("nobody/nothing", kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["{", '{"model_type": "no_such_model"}', "{}"])
def test_a_damaged_model_directory_is_one_line(
    tmp_path: Path, tiny_llama: Path, damage: str
) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(UserError, match=r"model\.path: cannot load") as caught:
        load_part(str(tmp_path), "model")
    assert "\n" not in str(caught.value)


def load_part(path: str, kind: str) -> object:
    section = ModelSection(path=path)
    if kind == "tokenizer":
        return models.load_tokenizer(section)
    return models.load_model(section, torch.float32, CPU)


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token(
    tmp_path: Path, tiny_llama: Path
) -> None:
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    loaded = models.load_tokenizer(ModelSection(path=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert models.load_tokenizer(ModelSection(path=str(tiny_llama))).pad_token == "<pad>"


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no EOS token"):
        models.load_tokenizer(ModelSection(path=str(tmp_path)))


def test_the_tiny_model_is_what_transformers_loads(tiny_llama: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert torch.equal(logits(load(tiny_llama)), logits(direct))
