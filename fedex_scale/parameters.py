"""Read and write one parameter, wherever it is: plain memory, a ZeRO shard, NVMe, a master copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedex_scale import distributed
from fedex_scale.algebra import Pair

Source = Callable[[str, Pair | None], Pair]
"""Gives a layer's factors; it may put them into the memory that it is shown, and answer that."""


def write_pair(layer: LoraLayer, adapter: str, give: Callable[[Pair | None], Pair]) -> None:
    """Set one layer's factors: the copies that compute, and their float32 masters.

    Args:
        give: answers the factors; it is shown the parameters if it may write into them itself.
    """
    here = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    direct = all(_is_plain(parameter) for parameter in here)
    into = Pair(*(parameter.data for parameter in here)) if direct else None
    pair = give(into)
    if into is None or pair is not into:
        for parameter, value in zip(here, pair, strict=True):
            _write(parameter, value)


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is all that there is of it, and in ordinary memory."""
    managed = hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")
    return not managed and parameter.device.type == "cpu" and parameter.is_contiguous()


@torch.no_grad()
def _write(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter here: the copy that computes, and the float32 master where there is one."""
    if hasattr(parameter, "ds_tensor"):
        shard = parameter.ds_tensor
        start = shard.ds_numel * distributed.rank()
        part = value.reshape(-1)[start : start + shard.ds_numel]
        padded = torch.zeros(shard.ds_numel, dtype=torch.float32)
        padded[: part.numel()] = part
        with resident(parameter) as flat:
            flat.copy_(padded)
        if parameter.requires_grad:
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, padded)
        return
    parameter.data.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())


@torch.no_grad()
def read_float32(parameter: nn.Parameter) -> Tensor:
    """Return a copy of the whole parameter, from its float32 master where there is one."""
    sharded = hasattr(parameter, "ds_tensor")
    if parameter.requires_grad and (sharded or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).to("cpu", torch.float32, copy=True)
    return read_whole(parameter).to(torch.float32, copy=True)


def read_whole(parameter: nn.Parameter) -> Tensor:
    """Return the parameter whole, on the CPU; every rank must take part."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data.to("cpu")
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.to("cpu", copy=True)


def partitioner(ds_config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """Return a function that leaves of a parameter the slice of this rank, where ZeRO-3 keeps it.

    Nothing is sent: each rank's slice is its own. DeepSpeed's public way to do so sends rank 0's
    copy of the whole first.
    """
    import deepspeed

    init = deepspeed.zero.Init(config_dict_or_path=ds_config)
    with init:  # for good: its nn.functional.linear, which does not keep gathered weights
        pass

    def partition(parameter: nn.Parameter) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return partition


def slice_of(numel: int) -> tuple[int, int]:
    """Return where this rank's slice of a partitioned parameter begins and ends."""
    size = -(-numel // distributed.world_size())
    start = min(numel, size * distributed.rank())
    return start, min(numel, start + size)


@contextmanager
def resident(parameter: nn.Parameter) -> Iterator[Tensor]:
    """Give a parameter's flat shard, fetched from NVMe and written back if that is its place."""
    shard = parameter.ds_tensor
    fetched = shard.final_location == "nvme" and shard.status.name == "NOT_AVAILABLE"
    if fetched:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield shard.data.view(-1)
    if fetched:
        parameter.nvme_swapper.swap_out_and_release([parameter])
