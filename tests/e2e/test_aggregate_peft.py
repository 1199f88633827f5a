"""`fedex-scale aggregate` of adapters that PEFT itself saved, on models of many kinds.

Clients are wrapped, drawn and saved by PEFT; what comes out is loaded by PEFT, unmodified, and
compared with a dense float64 model that holds every client's update.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import SIZES
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter

from fedex_scale.aggregate_report import AggregateSection
from fedex_scale.errors import UserError
from fedex_scale.job import Job
from fedex_scale.methods import MethodConfig
from fedex_scale.offline import aggregate_files

WEIGHTS = (0.5, 0.2, 0.3)
TOKENS = {"input_ids": torch.arange(3, 43).view(2, 20)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
Updates = list[dict[str, torch.Tensor]]


def make_base(
    cls: type[PreTrainedModel], config: object, path: Path, dtype: torch.dtype = torch.float32
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(config).to(dtype).save_pretrained(path)
    return path


def make_clients(
    cls: type[PreTrainedModel],
    base: Path,
    out: Path,
    *,
    seed: int = 0,
    change: Callable[[nn.Module, int], object] = lambda model, k: None,
    save: Mapping[str, object] | None = None,
    **options: object,
) -> tuple[list[Path], Updates]:
    """Let PEFT save three clients; return them, and what each adds to every layer, (O, I)."""
    draw = torch.Generator().manual_seed(seed)
    paths, updates = [], []
    start: dict[str, torch.Tensor] = {}
    for k in range(len(WEIGHTS)):
        model = get_peft_model(cls.from_pretrained(base), LoraConfig(**{"r": 3, **options}))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                first = torch.randn(parameter.shape, generator=draw) * 0.15
                noise = torch.randn(parameter.shape, generator=draw) * 0.05
                parameter.data = start.setdefault(name, first) + noise
        change(model, k)
        model.save_pretrained(out / f"client-{k}", **(save or {}))
        paths.append(out / f"client-{k}")
        updates.append(
            {
                name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
                for name, layer in model.named_modules()
                if isinstance(layer, LoraLayer)
            }
        )
    return paths, updates


def aggregate(
    base: Path,
    out: Path,
    clients: Sequence[Path],
    weights: tuple[float, ...] = WEIGHTS,
    **options: str,
) -> dict:
    method = {k: options.pop(k) for k in ("name", "assign") if k in options}
    return aggregate_files(
        Job(
            base=str(base),
            out=out,
            clients=tuple(clients),
            weights=weights,
            method=MethodConfig(**method),
            section=AggregateSection(**options),
        )
    )


def dense(cls: type[PreTrainedModel], base: Path, updates: Updates) -> PreTrainedModel:
    """Return the base with every update added, float64; a tied output layer gets its own weight."""
    model = cls.from_pretrained(base, dtype=torch.float64)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the usual one knows no float64
    for layer in updates[0]:
        delta = sum(w * update[layer] for w, update in zip(WEIGHTS, updates, strict=True))
        module = model.get_submodule(layer)
        module.weight = nn.Parameter(module.weight.detach() + delta)
    return model


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs, return_dict=True)[0].double()


def assert_exact(
    cls: type[PreTrainedModel],
    base: Path,
    out: Path,
    updates: Updates,
    inputs: Mapping = TOKENS,
    adapter: str = "adapter",
) -> None:
    used = out / "base" if (out / "base").exists() else base
    model = PeftModel.from_pretrained(cls.from_pretrained(used), out / adapter)
    got, plain = outputs(model, inputs), outputs(cls.from_pretrained(base), inputs)
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = outputs(dense(cls, base, updates), doubles)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - plain).norm() > 1e-2 * expected.norm()


def keys(directory: Path) -> set[str]:
    return set(load_file(directory / "adapter_model.safetensors"))


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


BERT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BERT |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.3}


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
        ([None, 3, None], "task_type: expected a name or null, got 3"),
        ([None, "two\nlines", None], "task_type: expected a name or null, got 'two"),
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


VIT = {"image_size": 32, "patch_size": 16, "hidden_dropout_prob": 0.0}
RENAMED = {
    "ViT": (ViTForImageClassification, ViTConfig(**{**BERT, **VIT}, num_labels=5), PIXELS),
    "Gemma-3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config={**SIZES, "num_hidden_layers": 2},
            vision_config={**BERT, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        TOKENS,
    ),
    "Mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4), TOKENS),
}


@pytest.mark.parametrize("fold", ["side", "round"])
@pytest.mark.parametrize("kind", RENAMED)
def test_weights_that_the_files_name_otherwise(tmp_path, kind, fold) -> None:
    """transformers renames their weights as it loads them, and back as it saves them."""
    cls, config, inputs = RENAMED[kind]
    base = make_base(cls, config, tmp_path / "base")
    clients, updates = make_clients(cls, base, tmp_path, target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out"
    aggregate(base, out, clients, fold=fold)
    assert_exact(cls, base, out, updates, inputs)
    if fold == "round":
        before, after = (load_file(path / "model.safetensors") for path in (base, out / "base"))
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert before.keys() == after.keys()
        assert len(changed) == len(updates[0])


def test_weights_that_are_made_of_others_take_no_fold(tmp_path, monkeypatch) -> None:
    """q, k and v in one tensor of the files: their side adapter is exact, a fold is refused."""
    parts = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    split = WeightConverter("self_attn.qkv.weight", parts, operations=[Chunk(dim=0)])
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(table, "LlamaForCausalLM", [split])
    sizes = {**SIZES, "num_key_value_heads": 4}  # torch.chunk wants them alike
    base = make_base(LlamaForCausalLM, LlamaConfig(**sizes), tmp_path / "base")
    assert "model.layers.0.self_attn.qkv.weight" in load_file(base / "model.safetensors")
    clients, updates = make_clients(
        LlamaForCausalLM, base, tmp_path, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    aggregate(base, tmp_path / "out", clients)
    assert_exact(LlamaForCausalLM, base, tmp_path / "out", updates)
    with pytest.raises(UserError, match="transformers makes its weight of others"):
        aggregate(base, tmp_path / "folded", clients, fold="round")


COPY = "base_model.model.lm_head.base_layer.weight"


def edit(client: Path, change: Callable[[dict], object]) -> None:
    file = client / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
