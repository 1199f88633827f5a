"""Joining the process group, and acting as one: torch.distributed only, any launcher."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fedex_scale.runtime import launched
from fedex_scale.runtime.errors import UserError

T = TypeVar("T")


def join_group(*, required: bool) -> None:
    """Join the launcher's processes: nccl with CUDA, gloo without.

    Args:
        required: make a group of one where no launcher started us (DeepSpeed wants a group).

    Raises:
        UserError: the launcher started more processes than joined, so that each would train
            apart without a word.
    """
    expected = launched.num_processes()
    if not dist.is_initialized() and (required or expected > 1):
        alone = int(os.environ.get("WORLD_SIZE") or 1) == 1  # also in a child of such a process
        if alone:  # DeepSpeed asks for all five
            one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(one, MASTER_PORT=str(free_port()))
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # One process meets nobody: a store of its own takes no port that another may have taken.
        meet = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(backend, timeout=timedelta(minutes=30), **meet)
    if world_size() != expected:
        raise UserError(
            f"launcher: expected {expected} processes in one group, got {world_size()}; "
            "start with torchrun, deepspeed or accelerate launch, which set RANK and WORLD_SIZE"
        )


def leave(code: int) -> NoReturn:
    """Leave the group and end the process with an exit code.

    Of several processes each ends at once: gloo's threads may still hold tensors, and abort a
    process that waits for Python to shut down (seen in 5 of 80 runs).
    """
    several = world_size() > 1
    if dist.is_initialized() and not (several and code):  # others may wait in a collective
        dist.destroy_process_group()
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(*values: float) -> list[float]:
    """Return each value summed over the ranks, in float64."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return total.tolist()


def summed(total: Tensor) -> float:
    """Return a number summed over the ranks: the one time that a step waits for its device."""
    if world_size() > 1:
        dist.all_reduce(total)
    return total.item()


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank.

    A UserError there is raised on every rank, so that none is left waiting.
    """
    if world_size() == 1:
        return action()
    box: list = [None, None]
    if is_main():
        try:
            box[0] = action()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it fails for the user on one, every rank raises it."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    problems: list = [problem]
    if world_size() > 1:
        problems = [None] * world_size()
        dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem is not None:
            raise UserError(problem)
    return result  # type: ignore[return-value]


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
