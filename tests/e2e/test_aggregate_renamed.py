"""Bases whose files name or cut their weights otherwise than their modules, as transformers can."""

from __future__ import annotations

import pytest
import torch
from peft_clients import (
    BERT,
    PIXELS,
    TOKENS,
    aggregate,
    assert_exact,
    make_base,
    make_clients,
)
from safetensors.torch import load_file
from tiny import SIZES
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter

from fedex_scale.runtime.errors import UserError

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
