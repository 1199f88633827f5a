"""`fedex-scale aggregate` of adapters that PEFT itself saved: what it adds to its files is meant.

What comes out is loaded by PEFT, unmodified, and compared with a dense float64 model that holds
every client's update.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_clients import (
    BERT,
    TOKENS,
    WEIGHTS,
    aggregate,
    assert_exact,
    dense,
    edit,
    keys,
    make_base,
    make_clients,
    outputs,
)
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedex_scale.runtime.errors import UserError

COPY = "base_model.model.lm_head.base_layer.weight"


def llama(path: Path, **options: object) -> Path:
    return make_base(LlamaForCausalLM, LlamaConfig(**SIZES, **options), path)


HEAD = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("method", ["fedex", "flora"])
@pytest.mark.parametrize("fold", ["side", "round", "carry"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_output_layer_keeps_its_whole_update(tmp_path, fold, method) -> None:
    """PEFT saves `lm_head.base_layer.weight` beside the factors, and loads it over the base's."""
    base = llama(tmp_path / "base", tie_word_embeddings=False)
    clients, updates = make_clients(LlamaForCausalLM, base, tmp_path, **HEAD)
    assert "base_model.model.lm_head.base_layer.weight" in keys(clients[0])
    out = tmp_path / "out"
    aggregate(base, out, clients, fold=fold, name=method)
    assert (out / "base").exists() == (fold != "side")
    assert not [key for key in keys(out / "adapter") if "base_layer" in key]
    assert_exact(LlamaForCausalLM, base, out, updates)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_tied_output_layer_comes_with_the_embedding(tmp_path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    clients, updates = make_clients(LlamaForCausalLM, base, tmp_path, **HEAD)
    assert "base_model.model.lm_head.base_layer.weight" in keys(clients[0])
    out = tmp_path / "out"
    aggregate(base, out, clients)
    assert not [key for key in keys(out / "adapter") if "base_layer" in key]
    assert_exact(LlamaForCausalLM, base, out, updates)
    with pytest.raises(UserError, match="layer lm_head: its weight is the embedding's too"):
        aggregate(base, tmp_path / "folded", clients, fold="round")


def test_an_output_layer_that_is_the_only_embedding_there_is_takes_no_fold(tmp_path) -> None:
    """A config may say nothing of tying, and the files may hold the weight as the output layer."""
    config = GPT2Config(vocab_size=97, n_embd=32, n_inner=48, n_layer=2, n_head=4)
    base = make_base(GPT2LMHeadModel, config, tmp_path / "base")
    clients, _ = make_clients(GPT2LMHeadModel, base, tmp_path, target_modules=["lm_head"])
    settings = json.loads((base / "config.json").read_text())
    settings.pop("tie_word_embeddings")
    (base / "config.json").write_text(json.dumps(settings))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(base)
    assert torch.equal(model.transformer.wte.weight, tensors["lm_head.weight"])
    with pytest.raises(UserError, match="layer lm_head: its weight is the embedding's too"):
        aggregate(base, tmp_path / "out", clients, fold="round")
    aggregate(base, tmp_path / "out", clients)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_copy_of_the_base_in_another_dtype_is_the_base(tmp_path) -> None:
    """A client may have held a float32 base in bf16, and another may not have saved its copy."""
    base = llama(tmp_path / "base", tie_word_embeddings=False)
    clients, updates = make_clients(LlamaForCausalLM, base, tmp_path, **HEAD)
    edit(clients[0], lambda x: x.update({COPY: x[COPY].bfloat16()}))
    edit(clients[1], lambda x: x.pop(COPY))
    aggregate(base, tmp_path / "out", clients, fold="round")
    assert_exact(LlamaForCausalLM, base, tmp_path / "out", updates)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fold", ["side", "round"])
@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_copy_that_is_not_the_bases_is_refused(tmp_path, tied, fold, place) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    clients, _ = make_clients(LlamaForCausalLM, base, tmp_path, **HEAD)
    edit(clients[1], lambda x: x[COPY][place].add_(1e-3))
    with pytest.raises(UserError) as caught:
        aggregate(base, tmp_path / "out", clients, fold=fold)
    for part in ("client-1", COPY, f"expected the weight of {base}", "got another"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stranger", ["lm_head.base_layer.bias", "model.norm.base_layer.weight"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_copy_of_what_the_base_lacks_is_refused(tmp_path, stranger) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=False)
    clients, _ = make_clients(LlamaForCausalLM, base, tmp_path, **HEAD)
    for client in clients:
        edit(client, lambda x: x.update({f"base_model.model.{stranger}": torch.ones(97)}))
    with pytest.raises(UserError, match="got another"):
        aggregate(base, tmp_path / "out", clients)


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("fold", ["side", "round"])
def test_an_encoder_keeps_the_task_that_its_clients_name(tmp_path, task, fold) -> None:
    base = make_base(BertModel, BertConfig(**BERT), tmp_path / "base")
    targets = ["query", "value", "dense"]
    clients, updates = make_clients(
        BertModel, base, tmp_path, target_modules=targets, task_type=task
    )
    out = tmp_path / "out"
    aggregate(base, out, clients, fold=fold)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["task_type"] == task
    assert_exact(BertModel, base, out, updates)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([None, "CAUSAL_LM", None], "CAUSAL_LM"),
        (["SEQ_CLS", "CAUSAL_LM", None], "task_type: expected one of all clients, got CAUSAL_LM"),
        ([None, 3, None], "task_type: expected a string, got 3"),
        ([None, "two\nlines", None], "task_type: expected null or one of CAUSAL_LM, .* got 'two"),
    ],
)
def test_clients_that_name_tasks_unalike(tmp_path, tasks, expected) -> None:
    base = llama(tmp_path / "base")
    clients, _ = make_clients(LlamaForCausalLM, base, tmp_path, target_modules=["q_proj"])
    for client, task in zip(clients, tasks, strict=True):
        file = client / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": task}))
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            aggregate(base, tmp_path / "out", clients)
    else:
        aggregate(base, tmp_path / "out", clients)
        config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert config["task_type"] == expected


@pytest.mark.parametrize("assign", ["average", "keep"])
def test_a_classifier_is_averaged_for_the_server_and_every_client(tmp_path, assign) -> None:
    cls = BertForSequenceClassification
    base = make_base(cls, BertConfig(**BERT, num_labels=5), tmp_path / "base")

    def change(model: nn.Module, k: int) -> None:
        head = model.base_model.model.classifier.modules_to_save["default"]
        head.weight.data += 0.3 * k + 0.1
        head.bias.data -= k

    clients, updates = make_clients(
        cls, base, tmp_path, change=change, target_modules=["query"], task_type="SEQ_CLS"
    )
    out = tmp_path / "out"
    aggregate(base, out, clients, assign=assign)
    expected = dense(cls, base, updates)
    mean = sum(w * (0.3 * k + 0.1) for k, w in enumerate(WEIGHTS))
    expected.classifier.weight.data += mean
    expected.classifier.bias.data -= sum(w * k for k, w in enumerate(WEIGHTS))
    adapters = ["adapter", *(f"clients/client-000{k}" for k in range(3) if assign == "keep")]
    for adapter in adapters:
        model = PeftModel.from_pretrained(cls.from_pretrained(base, num_labels=5), out / adapter)
        torch.testing.assert_close(
            outputs(model, TOKENS), outputs(expected, TOKENS), rtol=1e-5, atol=1e-5
        )


def test_whole_numbers_that_come_along_stay_whole(tmp_path) -> None:
    """A third of 5, three times, is less than 5 in float64, and must not become 4."""
    base = llama(tmp_path / "base")
    clients, _ = make_clients(LlamaForCausalLM, base, tmp_path, target_modules=["q_proj"])
    name, numbers = "base_model.model.norm.count", torch.arange(100)
    for client in clients:
        edit(client, lambda x: x.update({name: numbers}))
    aggregate(base, tmp_path / "out", clients, weights=(1, 1, 1))
    got = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")[name]
    assert torch.equal(got, numbers)
