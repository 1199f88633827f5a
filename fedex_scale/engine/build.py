"""One engine for all clients: built once, reset for each, plain PyTorch or DeepSpeed alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedex_scale.config.learning import EngineSection, LoraSection, ModelSection, Optimizer
from fedex_scale.engine import lora_model, models, whole
from fedex_scale.engine.ds_config import read_ds_config, zero_stage
from fedex_scale.engine.fused import FusedLinear, want_input_gradients
from fedex_scale.engine.loading import load_base
from fedex_scale.engine.ops import naming_stale_locks
from fedex_scale.engine.parameters import (
    read_float32,
    resize,
)
from fedex_scale.runtime import distributed
from fedex_scale.tasks.interface import CAUSAL, ModelKind


@dataclass(kw_only=True)
class Engine:
    """The model with its adapters, the optimizer over the client adapter, and where they live."""

    model: PeftModel
    layers: dict[str, LoraLayer]
    optimizer: torch.optim.Optimizer
    trains: frozenset[str]
    max_grad_norm: float
    side_rank: int
    has_planes: bool = False
    by_example: bool = False
    kind: ModelKind = CAUSAL
    heads: tuple[str, ...] = ()
    whole: dict[str, nn.Parameter] = field(default_factory=dict)
    device: torch.device
    dtype: torch.dtype
    deepspeed: Any | None = None

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (O, I) of every adapted layer."""
        return lora_model.shapes(self.layers)

    @property
    def is_conv1d(self) -> bool:
        """Whether any adapted layer is GPT-2's Conv1D, which stores its weight as (I, O)."""
        return lora_model.is_conv1d(self.layers)

    @property
    def is_sharded(self) -> bool:
        """Whether ZeRO-3 holds a part of every weight on each rank."""
        ds = self.deepspeed
        return ds is not None and ds.zero_optimization_partition_weights()

    @property
    def settings(self) -> dict[str, Any]:
        """What adapter_config.json says of the task: PEFT's name for it, and the head."""
        settings: dict[str, Any] = {"task_type": self.kind.task_type}
        return settings | ({"modules_to_save": list(self.heads)} if self.heads else {})

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter that is trained whole."""
        return {name: whole.shape_of(parameter) for name, parameter in self.whole.items()}

    def whole_weights(self, *, copy: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield those parameters, float32 on the CPU; every rank must take part."""
        for name, parameter in self.whole.items():
            yield name, read_float32(parameter, copy=copy)


def build_engine(
    model: ModelSection,
    lora: LoraSection,
    section: EngineSection,
    *,
    trains: frozenset[str],
    side_rank: int,
    optimizer: Optimizer,
    micro_batch_size: int,
    accumulation: int,
    weight_decay: float,
    max_grad_norm: float,
    has_planes: bool = False,
    kind: ModelKind = CAUSAL,
) -> Engine:
    """Load the model and build the engine, once a run.

    Args:
        trains: which LoRA factors train, a subset of {"A", "B"}.
        side_rank: columns that the frozen side adapter may come to have, 0 for none.
        has_planes: a second matrix beside each weight takes the side adapter's place.
        accumulation: micro-batches in a full optimizer step, for DeepSpeed's bookkeeping.
        kind: of task: the model's class, its head, and the loss.

    Raises:
        UserError: settings that cannot work together, or a model that cannot be had.
    """
    device, dtype = distributed.device(), models.resolve_dtype(model)
    ds_config = None
    if section.deepspeed:
        ds_config = read_ds_config(
            section,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            max_grad_norm=max_grad_norm,
            bf16=dtype == torch.bfloat16,
            largest_weight=models.largest_weight(model, kind),
            quantization=model.quantization,
        )
    with naming_stale_locks() if ds_config is not None else nullcontext():
        base = load_base(model, dtype, device, ds_config, kind)
        if ds_config is None and model.quantization == "none":
            base.to(device)
        peft_model = lora_model.add_adapters(
            base, lora, trains=trains, kind=kind, fused=section.fused_lora
        )
        heads = whole.head_modules(base, kind)
        if model.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        trainable = [p for p in peft_model.parameters() if p.requires_grad]
        inner = _optimizer(optimizer, trainable, weight_decay)
        ds_engine = None
        if ds_config is not None:
            import deepspeed

            fused = any(isinstance(module, FusedLinear) for module in peft_model.modules())
            if fused and zero_stage(section) == 3:
                # One function needs all of a layer's parameters at once. DeepSpeed would take the
                # gradients of a leaf whose input needs none before they are there.
                want_input_gradients(peft_model)
                deepspeed.utils.set_z3_leaf_modules(peft_model, [FusedLinear])
            ds_engine, *_ = deepspeed.initialize(
                model=peft_model, optimizer=inner, config=ds_config, dist_init_required=False
            )
            inner = ds_engine.basic_optimizer
    engine = Engine(
        model=peft_model,
        layers=lora_model.lora_layers(peft_model),
        optimizer=inner,
        trains=trains,
        max_grad_norm=max_grad_norm,
        side_rank=side_rank,
        has_planes=has_planes,
        by_example=model.attention in ("auto", "flash_attention_2"),
        kind=kind,
        heads=heads,
        whole=whole.parameters_of(peft_model, heads),
        device=device,
        dtype=dtype,
        deepspeed=ds_engine,
    )
    if has_planes:
        _add_planes(engine)
    return engine


def _add_planes(engine: Engine) -> None:
    """Give every layer a second matrix, of zeros, in the side adapter's place."""
    for layer in engine.layers.values():
        plane_OI = torch.zeros(layer.out_features, layer.in_features, dtype=engine.dtype)
        resize(lora_model.make_plane(layer), plane_OI)


def _optimizer(
    kind: Optimizer, parameters: list[nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, weight_decay=weight_decay)
    import bitsandbytes

    cls = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[kind]
    return cls(parameters, lr=0.0, weight_decay=weight_decay)
