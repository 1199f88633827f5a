"""Load the base model; under ZeRO-3 each rank reads just the slices of the files that it keeps.

The model is built without memory for its weights. Then, in a room for one whole parameter after
another, a rank reads its own slice into its place, and lets DeepSpeed keep that slice: on a CPU
room that is never written to takes no memory. transformers' own way holds whole files on every rank
for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from fedex_scale.config.learning import ModelSection
from fedex_scale.engine import models, whole
from fedex_scale.engine.parameters import partitioner, slice_of
from fedex_scale.files.basefiles import INDEX_FILE, WEIGHTS_FILE, BaseFiles, base_directory
from fedex_scale.files.tensorfile import BLOCK_BYTES
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.interface import CAUSAL, ModelKind

log = logging.getLogger(__name__)

# How old checkpoints spell the parameters of a norm.
_LEGACY = (".gamma", ".beta")


def load_base(
    section: ModelSection,
    dtype: torch.dtype,
    device: torch.device,
    ds_config: dict[str, Any] | None,
    kind: ModelKind = CAUSAL,
) -> PreTrainedModel:
    """Return the frozen base model, partitioned under ZeRO-3; every rank must take part.

    Raises:
        UserError: it cannot be had, or its files do not hold what its config.json says.
    """
    zero3 = ds_config is not None and ds_config.get("zero_optimization", {}).get("stage") == 3
    if not (section.random or zero3):
        return models.load_model(section, dtype, device, kind)
    config = models.base_config(section, kind=kind)
    model, new = _without_weights(section, config, dtype, kind), set()
    if section.random:
        _draw(model, device, partitioner(ds_config) if zero3 else None)
    else:
        folder = base_directory(section.path, section.revision)
        reason = _why_not(model, folder)
        if reason:
            log.info("model: %s; every rank holds it whole while it loads", reason)
            with _transformers_partitions(ds_config):
                return models.load_model(section, dtype, torch.device("cpu"), kind)
        heads = whole.new_modules(model, kind)
        new = _read(model, BaseFiles(folder), device, partitioner(ds_config), heads)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
            models.check_generation(model, section)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    whole.draw(model, new, kind.seed)
    model.requires_grad_(False)
    return model.eval()


def _without_weights(
    section: ModelSection, config: PretrainedConfig, dtype: torch.dtype, kind: ModelKind
) -> PreTrainedModel:
    """Return the model with parameters on the meta device, tied ones being one, and buffers."""
    with init_empty_weights(include_buffers=False):
        model = kind.model_class.from_config(
            config,
            dtype=dtype,
            attn_implementation=models.attention(section, config),
            trust_remote_code=section.trust_remote_code,
        )
    model.tie_weights()
    if not kind.has_head:
        model.config.use_cache = True
    return model


def _why_not(model: PreTrainedModel, folder: Path) -> str | None:
    """Return why a model's files cannot be read slice by slice, or None if they can."""
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return "no safetensors files"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers converts the weights of {model.config.model_type}"
    if getattr(model, "_keep_in_fp32_modules", None):
        return f"{model.config.model_type} keeps some weights in float32"
    if any(name.endswith(_LEGACY) for name in BaseFiles(folder).names):
        return "an old spelling of its weights"
    return None


def _read(
    model: PreTrainedModel,
    files: BaseFiles,
    device: torch.device,
    partition: Callable[[nn.Parameter], None],
    heads: Collection[str],
) -> set[str]:
    """Read this rank's slice of every parameter, and buffers whole.

    Returns:
        The parameters of the head that the files do not have; they are still to be drawn.
    """
    owners = _owners(model)
    sources = [_find(model, files, names, like.shape, heads) for like, names in owners]
    buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    # One room for all: rooms that come and go would leave holes between the slices.
    largest = max(like.numel() for like, _ in owners)
    room = torch.empty(largest, dtype=model.dtype, device=device)
    for (like, names), source in zip(owners, sources, strict=True):
        flat = room[: like.numel()]
        start, stop = slice_of(like.numel())
        for block in files.blocks(source, (start, stop), buffer) if source else ():
            flat[start : start + block.numel()] = block
            start += block.numel()
        _put(model, names, nn.Parameter(flat.view(like.shape), requires_grad=False))
        partition(model.get_parameter(names[0]))
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent and name in files.names:
            buffer.copy_(files.read(name))
    return {name for (_, (name, *_)), x in zip(owners, sources, strict=True) if x is None}


def _draw(
    model: PreTrainedModel,
    device: torch.device,
    partition: Callable[[nn.Parameter], None] | None,
) -> None:
    """Draw the weights as transformers would for a new model, the same whatever the ranks.

    One module has its weights whole at a time, and then its slices.
    """
    owners = dict(_owners(model))
    devices = [device] if device.type == "cuda" else []
    for path, module in model.named_modules():
        here = {id(p): p for p in module.parameters(recurse=False) if p in owners}
        for like in here.values():
            whole = torch.empty(like.shape, dtype=like.dtype, device=device)
            _put(model, owners[like], nn.Parameter(whole, requires_grad=False))
            del whole
        if here:
            with torch.random.fork_rng(devices):
                torch.manual_seed(derive_seed("weights", path))
                model._init_weights(module)
        for like in here.values():
            parameter = model.get_parameter(owners.pop(like)[0])
            if partition:
                partition(parameter)


def _owners(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Return every parameter once, with all of its names: tied weights have several."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return list(found.items())


def _put(model: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, parameter)


def _find(
    model: PreTrainedModel,
    files: BaseFiles,
    names: list[str],
    shape: torch.Size,
    heads: Collection[str],
) -> str | None:
    """Return the name of a parameter in the files, with or without the model's prefix.

    None: it is of the head, and the files do not have it, or have it for other labels.
    """
    prefix = f"{model.base_model_prefix}."
    spelled = [s for name in names for s in (name, name.removeprefix(prefix), prefix + name)]
    source = next((name for name in spelled if name in files.names), None)
    if whole.is_below(names[0], heads) and (source is None or files.shape(source) != tuple(shape)):
        return None
    if source is None:
        whole.check_missing(model, heads, names[:1])
    if source is None:
        raise UserError(
            f"{files.path}: expected the weight {names[0]} in its files, found none; fetch the "
            "model again"
        )
    if files.shape(source) != tuple(shape):
        raise UserError(
            f"{files.path}, {source}: expected shape {tuple(shape)}, as config.json says, got "
            f"{files.shape(source)}; fetch the model again"
        )
    return source


@contextmanager
def _transformers_partitions(ds_config: dict[str, Any]) -> Iterator[None]:
    """Let transformers put each weight that it loads into its shards."""
    from transformers.integrations import HfDeepSpeedConfig

    holder = HfDeepSpeedConfig(ds_config)  # transformers sees it for as long as it lives
    yield
    del holder
