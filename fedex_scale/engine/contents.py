"""What a built engine holds: adapters, whole weights and the frozen base, set and read in place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

from fedex_scale.aggregation.weights import Target
from fedex_scale.engine import lora_model
from fedex_scale.engine.build import Engine
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


def _release(engine: Engine) -> None:
    """Under ZeRO-3, drop gathered copies, so that a shard is the only place to write to."""
    if engine.is_sharded:
        engine.deepspeed.empty_partition_cache()
