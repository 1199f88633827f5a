"""The base model wrapped once with the two LoRA adapters that all rounds use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fedex_scale.config.learning import LoraSection
from fedex_scale.engine import whole
from fedex_scale.engine.fused import fuse
from fedex_scale.engine.head import compute_loss_in_pieces
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks.interface import CAUSAL, ModelKind

CLIENT, SIDE = "default", "side"  # names of the two PEFT adapters


def add_adapters(
    model: PreTrainedModel,
    lora: LoraSection,
    *,
    trains: frozenset[str],
    side_rank: int = 1,
    kind: ModelKind = CAUSAL,
    fused: bool = True,
) -> PeftModel:
    """Wrap the model with the client adapter and the frozen side adapter.

    Args:
        trains: which factors train, a subset of {"A", "B"}.
        side_rank: columns of the side adapter to begin with; it grows as residuals come.
        kind: of task; its head is trained whole, and has no adapter.
        fused: a layer's products are one function in training, where they can be.

    Raises:
        UserError: the target modules match nothing, or experts that share a tensor.
    """
    targets = lora.target_modules
    targets = targets if isinstance(targets, str) else list(targets)
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]
    heads = whole.head_modules(model, kind)
    # With another task_type PEFT would make a second copy of the head.
    apart: dict = {"task_type": kind.task_type}
    if kind.everything:
        targets, apart = DUMMY_TARGET_MODULES, {"task_type": None}
    elif heads:
        names = "|".join(map(re.escape, heads))
        apart = {"task_type": None, "exclude_modules": rf"({names})(\..*)?"}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=targets,
        **apart,
    )
    try:
        peft_model = get_peft_model(model, config, adapter_name=CLIENT)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise
        raise _no_match(targets, model) from None
    if isinstance(targets, list):
        _check_every_name_matches(targets, peft_model)
    side = LoraConfig(r=side_rank, lora_alpha=side_rank, target_modules=targets, **apart)
    peft_model.add_adapter(SIDE, side)
    for name, layer in lora_layers(peft_model).items():
        if isinstance(layer, ParamWrapper):
            raise UserError(
                f"lora.target_modules: expected layers of one matrix each, got {name} of "
                f"{model.config.model_type}, which holds several experts; name others, such as "
                "[q_proj, k_proj, v_proj, o_proj]"
            )
        _train_as_the_base(layer, model.dtype)
        if fused:
            fuse(layer, CLIENT)
    whole.train_in_float32(model, heads)
    activate(peft_model, [CLIENT], trains=trains, heads=heads)
    if not kind.everything:
        compute_loss_in_pieces(model)
    return peft_model


def _train_as_the_base(layer: LoraLayer, dtype: torch.dtype) -> None:
    """Let adapters train in the base's dtype, instead of making every layer's input float32.

    The client adapter stays float32, for the optimizer; the frozen side adapter need not.
    """
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        for name, factor in factors.items():
            factor.__class__ = _Factor
            if name == SIDE:
                factor.to(dtype)


def make_plane(layer: LoraLayer) -> nn.Parameter:
    """Let the side adapter be a second matrix of the weight, still to be given its size.

    Returns:
        What is to hold it, as (O, I).
    """
    plane = layer.lora_B[SIDE].weight
    layer.lora_A[SIDE] = _Same().to(plane.device, plane.dtype)
    return plane


class _Same(nn.Module):
    """In place of A where B is a whole matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)  # PEFT asks for its dtype

    def forward(self, input: Tensor) -> Tensor:
        return input


class _Factor(nn.Linear):
    """Trains in its input's dtype, and scores in its own, as PEFT would, to the bit."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype if self.training else self.weight.dtype
        return functional.linear(input.to(dtype), self.weight.to(dtype))


def _check_every_name_matches(targets: list[str], model: PeftModel) -> None:
    """Raise a UserError where one of several names adapts nothing, which PEFT passes over."""
    adapted = lora_layers(model)
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in adapted)]
    if unmatched:
        raise _no_match(unmatched, model.get_base_model())


def _no_match(targets: list[str] | str, model: PreTrainedModel) -> UserError:
    modules = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if _linear(m)}
    names = {name.rsplit(".", 1)[-1] for name in modules if ".lora_" not in name}
    return UserError(
        f"lora.target_modules: expected names of modules in {model.config.model_type}, "
        f"got {targets}, which match nothing; choose from {', '.join(sorted(names))}"
    )


def activate(
    model: PeftModel, adapters: list[str], *, trains: frozenset[str], heads: Collection[str] = ()
) -> None:
    """Let the forward pass see these adapters; modules of `heads` are trained whole.

    PEFT makes active adapters trainable as a whole, so the flags are set anew here.
    """
    model.base_model.set_adapter(adapters)
    for name, parameter in model.named_parameters():
        factor = "A" if ".lora_A." in name else "B" if ".lora_B." in name else None
        is_head = whole.is_below(name.removeprefix("base_model.model."), heads)
        parameter.requires_grad_(is_head or (f".{CLIENT}." in name and factor in trains))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return every adapted layer by its name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def shapes(layers: Mapping[str, LoraLayer]) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every adapted layer."""
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def is_conv1d(layers: Mapping[str, LoraLayer]) -> bool:
    """Return whether any of them is GPT-2's Conv1D, which stores its weight as (I, O)."""
    return any(layer.fan_in_fan_out for layer in layers.values())


def tied_layers(model: nn.Module) -> list[str]:
    """Return the adapted layers whose weight is another module's too, as a tied embedding is."""
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    layers = lora_layers(model).items()
    return [name for name, layer in layers if owners[layer.get_base_layer().weight] > 1]


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
