"""What a base model is, without loading it: the server's four facts, and what it is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.learning import ModelSection
from fedex_scale.config.settings import Config
from fedex_scale.engine import lora_model, models
from fedex_scale.federation.facts import ModelFacts
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.basefiles import BaseFiles, base_directory
from fedex_scale.methods.all import METHODS
from fedex_scale.planning.footprint import shape_model
from fedex_scale.runtime.errors import UserError
from fedex_scale.sites.sent import ADAPTERS, LARGEST, SERVER_FILE, BaseModelTold, Sent

# Of a config.json: where it came from, and how it is run here.
_NO_NUMBERS = frozenset(
    "_name_or_path architectures attn_implementation dtype torch_dtype transformers_version "
    "use_cache".split()
)
_SAMPLE = 64  # numbers of a weight


def facts_of(config: Config, side_rank: int) -> ModelFacts:
    """Return what the server has to know of a config's model, on shapes alone.

    Raises:
        UserError: there is no such model, or none of these layers.
    """
    dtype = models.resolve_dtype(config.model)
    trains = METHODS[config.method.name].trains
    model = shape_model(config.model, config.lora, dtype=dtype, trains=trains, side_rank=0)
    layers = lora_model.lora_layers(model)
    return ModelFacts(
        layers=lora_model.shapes(layers),
        side_rank=side_rank,
        dtype=dtype,
        is_conv1d=lora_model.is_conv1d(layers),
    )


def tell_base(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, layers: Iterable[str]
) -> BaseModelTold:
    """Return what a base model is known by."""
    return BaseModelTold(
        config=_numbers(models.base_config(section, offline=True).to_diff_dict()),
        tokenizer=_digest_of_tokenizer(tokenizer),
        weights=None if section.random else _digest_of_weights(section, layers),
    )


def _numbers(config: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(config, default=str))
    return {key: value for key, value in plain.items() if key not in _NO_NUMBERS}


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    known = [sorted(tokenizer.get_vocab().items()), special]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _digest_of_weights(section: ModelSection, layers: Iterable[str]) -> str | None:
    """Return the SHA-256 of a few numbers of each adapted layer, rounded to bfloat16.

    So that a copy of the model in another dtype is the same one. None where there are no files.
    """
    digest = hashlib.sha256()
    try:
        base = BaseFiles(base_directory(section.path, section.revision))
        for layer in sorted(layers):
            name = base.find(layer)
            if name is None:
                return None
            span = (0, min(_SAMPLE, torch.Size(base.shape(name)).numel()))
            buffer = torch.empty(_SAMPLE * base.dtype(name).itemsize, dtype=torch.uint8)
            for block in base.blocks(name, span, buffer):
                digest.update(block.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    except UserError:
        return None
    return digest.hexdigest()


def check_state(sent: Sent, parts: Mapping[str, Path]) -> None:
    """Raise a UserError where a state's adapters are none that a server could have made.

    Args:
        parts: where `adapter` and `side` lie.
    """
    remedy = "fetch the server's state again, or ask who runs it"
    for part in ADAPTERS[: 1 + sent.has_side]:
        adapter = Adapter(parts[part])
        if set(adapter.layers) != set(sent.layers) or adapter.full_weights:
            raise UserError(f"{adapter.path}: expected the layers of {SERVER_FILE}; {remedy}")
        for layer, shape in sent.layers.items():
            rank = adapter.rank_of(layer)
            if adapter.shapes(layer) != tuple(shape) or (part == "adapter" and rank != sent.rank):
                raise UserError(
                    f"{adapter.path}, layer {layer}: expected shape {tuple(shape)}, rank "
                    f"{sent.rank}, got {adapter.shapes(layer)}, {rank}; {remedy}"
                )
            if not all(x.abs().max() <= LARGEST for x in adapter.pair(layer)):
                raise UserError(
                    f"{adapter.path}, layer {layer}: expected factors within {LARGEST:g}, got NaN, "
                    f"Inf or larger ones; {remedy}"
                )
