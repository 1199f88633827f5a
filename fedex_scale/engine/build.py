"""One engine for all clients: built once, reset for each, plain PyTorch or DeepSpeed alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from fedex_scale.aggregation.weights import Target
from fedex_scale.config.learning import EngineSection, LoraSection, ModelSection, Optimizer
from fedex_scale.engine import lora_model, models, whole
from fedex_scale.engine.build_lock import naming_stale_locks
from fedex_scale.engine.ds_config import read_ds_config, zero_stage
from fedex_scale.engine.fused import FusedLinear, stacks_held, want_input_gradients
from fedex_scale.engine.head import send
from fedex_scale.engine.loading import load_base
from fedex_scale.engine.lora_model import CLIENT, SIDE
from fedex_scale.engine.parameters import (
    Source,
    read_float32,
    read_whole,
    resident,
    resize,
    write,
    write_pair,
)
from fedex_scale.methods.algebra import Pair
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


def set_adapter(engine: Engine, source: Source, *, side: bool) -> None:
    """Let the engine hold an adapter: every factor, frozen ones and float32 masters included.

    Args:
        source: the factors by layer.
        side: whether the side adapter holds anything, and so takes part.
    """
    _release(engine)
    _activate(engine, [CLIENT, SIDE] if side else [CLIENT])
    for name, layer in engine.layers.items():
        write_pair(layer, CLIENT, source(name))
    _set_whole(engine, source)


def reset_for_client(engine: Engine, source: Source, *, side: bool) -> None:
    """Make the engine as if just built, with the given adapter: nothing of earlier clients stays.

    Drops the optimizer's moments and step counts as well. The learning rate is a function of the
    step and randomness is seeded by the client (client.py), so nothing else is left to reset.
    """
    set_adapter(engine, source, side=side)
    _zero_moments(engine.optimizer)
    (engine.deepspeed or engine).optimizer.zero_grad()


def _zero_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state to what it was before the first step, where it lies.

    Dropped, it would live on: ZeRO-2 and paged optimizers hold it as well.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if name.startswith("qmap"):  # bitsandbytes' table of what its 8 bits mean
                continue
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int):
                state[name] = 0


def train_step(
    engine: Engine, micro_batches: Sequence[dict[str, Tensor]], *, units: int, lr: float
) -> float:
    """Do one optimizer step and return its loss, the mean over the step's units.

    Args:
        micro_batches: this rank's share; as many on every rank. A batch whose labels are all
            masked takes part with loss 0.
        units: trained tokens, or examples, in the whole step, over all ranks and micro-batches, so
            that the loss does not depend on how the examples are spread.
        lr: learning rate of this step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.model.train()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    ds, labels_stay = engine.deepspeed, getattr(engine.model.get_base_model(), "labels_stay", False)
    # A shard's layer is whole for a moment only, and stacks its factors anew.
    held = [] if _is_sharded(engine) else engine.layers.values()
    with stacks_held(held, engine.dtype):
        for i, batch in enumerate(micro_batches):
            here = ("labels",) if labels_stay else ()
            batch = {n: x if n in here else send(x, engine.device) for n, x in batch.items()}
            if ds is not None:
                ds.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss = engine.kind.loss(ds or engine.model, batch, units)
            total += loss.detach()
            if ds is not None:
                # DeepSpeed averages gradients over ranks; the loss is already a share of the sum.
                ds.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            else:
                loss.backward()
    if engine.deepspeed is not None:
        engine.deepspeed.step()
    else:
        _plain_step(engine)
    return distributed.summed(total)


def read_pairs(engine: Engine, *, copy: bool = True) -> Iterator[tuple[str, Pair]]:
    """Yield the client adapter layer by layer, float32 on the CPU; every rank must take part.

    Args:
        copy: if not, the tensors may be the engine's own memory: a next step would change them,
            but not a next client, which gets memory of its own.
    """
    for name, layer in engine.layers.items():
        A, B = layer.lora_A[CLIENT].weight, layer.lora_B[CLIENT].weight
        yield name, Pair(read_float32(A, copy=copy), read_float32(B, copy=copy))


def read_base_weight(engine: Engine, layer: str) -> Tensor:
    """Return one frozen weight whole, on the CPU; every rank must take part.

    With planes: the sum of both in float32, in the weight's own orientation.
    """
    module = engine.layers[layer]
    weight = read_whole(module.get_base_layer().weight)
    if not engine.has_planes:
        return weight
    plane = read_whole(module.lora_B[SIDE].weight).float()
    return weight.float() + (plane.T if module.fan_in_fan_out else plane)


def set_side(engine: Engine, source: Source) -> None:
    """Set the side adapter on this rank; it counts once `set_adapter` is told so.

    Args:
        source: the factors by layer; layers may differ in rank.
    """
    _release(engine)
    for name, layer in engine.layers.items():
        layer.scaling[SIDE] = 1.0
        _set_side_pair(engine, layer, source(name), engine.dtype)


def set_single(engine: Engine, source: Source, *, scaling: float) -> None:
    """Let the forward pass see one adapter alone, in the side adapter's place.

    It is float32, as PEFT loads it, so that its scores are those of whoever loads it.

    Args:
        scaling: what B A is multiplied by.
    """
    _release(engine)
    for name, layer in engine.layers.items():
        layer.scaling[SIDE] = scaling
        _set_side_pair(engine, layer, source(name), torch.float32)
    _set_whole(engine, source)
    _activate(engine, [SIDE])


def _set_whole(engine: Engine, source: Source) -> None:
    for name, parameter in engine.whole.items():
        write(parameter, source(name))


def _set_side_pair(engine: Engine, layer: LoraLayer, pair: Pair, dtype: torch.dtype) -> None:
    missing = -pair.A_RI.shape[0] % (16 if engine.device.type == "cuda" else 1)
    resize(layer.lora_A[SIDE].weight, pad(pair.A_RI, (0, 0, 0, missing)).to(dtype))
    resize(layer.lora_B[SIDE].weight, pad(pair.B_OR, (0, missing)).to(dtype))


def _add_planes(engine: Engine) -> None:
    """Give every layer a second matrix, of zeros, in the side adapter's place."""
    for layer in engine.layers.values():
        plane_OI = torch.zeros(layer.out_features, layer.in_features, dtype=engine.dtype)
        resize(lora_model.make_plane(layer), plane_OI)


def _activate(engine: Engine, adapters: list[str]) -> None:
    if adapters != engine.model.active_adapters:  # a walk over all modules costs as a read
        lora_model.activate(engine.model, adapters, trains=engine.trains, heads=engine.heads)


def fold_targets(engine: Engine) -> dict[str, Target]:
    """Return where each adapted layer's frozen weight, or its second plane, lives on this rank."""
    targets = {}
    for name, layer in engine.layers.items():
        weight, transposed = layer.get_base_layer().weight, bool(layer.fan_in_fan_out)
        if engine.has_planes:
            weight, transposed = layer.lora_B[SIDE].weight, False
        if not weight.is_floating_point():  # packed by bitsandbytes
            shape = (layer.out_features, layer.in_features)
            targets[name] = Target(
                shape=shape, numel=math.prod(shape), device=engine.device, writable=False
            )
            continue
        if not hasattr(weight, "ds_tensor"):
            flat, shape = weight.data.view(-1), tuple(weight.shape)
            targets[name] = Target(flat=flat, shape=shape, transposed=transposed)
            continue
        start = weight.ds_tensor.ds_numel * distributed.rank()
        targets[name] = Target(
            lend=lambda w=weight: _lend_shard(engine, w),
            shape=tuple(weight.ds_shape),
            numel=max(0, min(weight.ds_tensor.ds_numel, weight.ds_numel - start)),
            start=start,
            device=engine.device,
            transposed=transposed,
        )
    return targets


@contextmanager
def _lend_shard(engine: Engine, weight: nn.Parameter) -> Iterator[Tensor]:
    """Give this rank's elements of a partitioned weight on the engine's device, to be changed."""
    _release(engine)
    with resident(weight) as shard:
        start = shard.numel() * distributed.rank()
        here = shard[: max(0, min(shard.numel(), weight.ds_numel - start))]
        there = here.to(engine.device)
        yield there
        if there.data_ptr() != here.data_ptr():
            here.copy_(there)


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


def _plain_step(engine: Engine) -> None:
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if distributed.world_size() > 1:
        flat = torch.cat([p.grad.view(-1) for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
    if engine.max_grad_norm > 0 and math.isfinite(engine.max_grad_norm):
        torch.nn.utils.clip_grad_norm_(parameters, engine.max_grad_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)


def _release(engine: Engine) -> None:
    """Under ZeRO-3, drop gathered copies, so that a shard is the only place to write to."""
    if _is_sharded(engine):
        engine.deepspeed.empty_partition_cache()


def _is_sharded(engine: Engine) -> bool:
    return engine.deepspeed is not None and engine.deepspeed.zero_optimization_partition_weights()
