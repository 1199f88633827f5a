"""Read and write one parameter, wherever it is: plain memory, a ZeRO shard, NVMe, a master copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime import distributed

Source = Callable[[str], Pair | Tensor]
"""Gives a layer's factors, or a whole weight by its name."""


def write_pair(layer: LoraLayer, adapter: str, pair: Pair) -> None:
    """Set one layer's factors: the copies that compute, and their float32 masters."""
    write(layer.lora_A[adapter].weight, pair.A_RI)
    write(layer.lora_B[adapter].weight, pair.B_OR)


def resize(parameter: nn.Parameter, value: Tensor) -> None:
    """Let a frozen parameter be another matrix, of any shape and dtype; the same on every rank."""
    value = value.detach()
    if not hasattr(parameter, "ds_tensor"):
        parameter.data = value.to(parameter.device, copy=True)
        return
    if tuple(parameter.ds_shape) == tuple(value.shape) and parameter.ds_tensor.dtype == value.dtype:
        write(parameter, value)
        return
    if parameter.ds_tensor.final_location == "nvme":
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    device = parameter.data.device
    parameter.data = value.to(device, copy=True)
    parameter.ds_shape, parameter.ds_numel = value.shape, value.numel()
    parameter.ds_status = type(parameter.ds_status).AVAILABLE
    parameter.ds_tensor = None
    parameter.partition()


def _is_plain(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is all that there is of it, in ordinary memory of its own."""
    managed = hasattr(parameter, "ds_tensor") or hasattr(parameter, "_hp_mapping")
    if managed or parameter.device.type != "cpu":
        return False
    return parameter.untyped_storage().nbytes() == parameter.nbytes


def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter here: the copy that computes, and the float32 master where there is one.

    A plain parameter gets new memory, so that who still reads the old finds what was there.
    """
    if _is_plain(parameter):
        parameter.data = value.to(parameter.dtype, memory_format=torch.contiguous_format, copy=True)
        return
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


def read_float32(parameter: nn.Parameter, *, copy: bool = True) -> Tensor:
    """Return the whole parameter on the CPU, from its float32 master where there is one.

    Args:
        copy: if not, it may be the parameter's own memory, which `write_pair` leaves as it is.
    """
    sharded = hasattr(parameter, "ds_tensor")
    if parameter.requires_grad and (sharded or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        whole = safe_get_full_fp32_param(parameter)
    else:
        whole = read_whole(parameter) if sharded else parameter.data
    return whole.detach().to("cpu", torch.float32, copy=copy or not _is_plain(parameter))


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
