"""The base model and its tokenizer: what is loaded, in which dtype, and what cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import logits
from transformers import AutoModelForCausalLM

from fedex_scale.config.learning import ModelSection
from fedex_scale.engine import models
from fedex_scale.runtime.errors import UserError

CPU = torch.device("cpu")


def load(path: Path, dtype: torch.dtype = torch.float32, **settings: object):
    return models.load_model(ModelSection(path=str(path), **settings), dtype, CPU)


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
    with pytest.raises(
        UserError, match=r"model\.path: cannot load|config.json: not valid"
    ) as caught:
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
