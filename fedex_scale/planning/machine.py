"""A machine's memory: as it is here, or as the user describes one."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedex_scale.runtime.errors import UserError

# What training reaches of an A100's bfloat16 rate, for times, unless told otherwise.
TFLOPS = 312.0 * 0.4
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is; bytes, None for unknown.

    Fields:
        gpus: how many, or ranks on a CPU where `gpu_memory` is 0.
        tflops: that training reaches on one GPU.
    """

    gpus: int = 1
    gpu_memory: int | None = 0
    host_memory: int | None = None
    nvme: int | None = None
    disk: int | None = None
    tflops: float = TFLOPS

    @property
    def is_cpu(self) -> bool:
        return self.gpu_memory == 0


def parse_size(text: str, name: str) -> int:
    """Return the bytes of a size such as 80GB.

    Raises:
        UserError: no number, or no unit.
    """
    for unit, factor in _UNITS.items() if isinstance(text, str) else ():
        number = text.strip().removesuffix(unit)
        if number != text.strip():
            try:
                size = float(number)
            except ValueError:
                break
            if 0 < size < math.inf:
                return int(size * factor)
    raise UserError(f"{name}: expected a size with its unit, such as 80GB or 1TB, got {text}")


def this_machine() -> Machine:
    """Return the machine that this runs on; its disks are not looked at."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    count = torch.cuda.device_count()
    # Not of `mem_get_info`, which would open a context on every GPU.
    sizes = (torch.cuda.get_device_properties(i).total_memory for i in range(count))
    memory = min(sizes, default=0)
    return Machine(gpus=ranks, gpu_memory=memory, host_memory=available_ram() or None)


def describe_machine(
    gpus: int | None,
    gpu_memory: str | None,
    host_memory: str | None,
    nvme: str | None,
    tflops: float | None,
) -> Machine:
    """Return this machine, or another one where memory sizes are given; None: as here.

    Raises:
        UserError: a size without a unit, or a count below 1.
    """
    for name, value in (("--gpus", gpus), ("--tflops", tflops)):
        kinds = int if name == "--gpus" else int | float
        if value is not None and not (isinstance(value, kinds) and 0 < value < math.inf):
            raise UserError(f"{name}: expected a number above 0, got {value!r}; give one")
    found = {
        "gpus": gpus,
        "gpu_memory": parse_size(gpu_memory, "--gpu-memory") if gpu_memory else None,
        "host_memory": parse_size(host_memory, "--host-memory") if host_memory else None,
        "nvme": parse_size(nvme, "--nvme") if nvme else None,
        "tflops": tflops,
    }
    there = replace(this_machine(), gpus=torch.cuda.device_count() or 1)
    if gpu_memory and not host_memory:
        there = replace(there, host_memory=None)  # another machine's is not known
    return replace(there, **{name: value for name, value in found.items() if value is not None})


def available_ram() -> int:
    """Return how many bytes of host memory can be had; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return 0
