"""What the launcher's environment says of this process, before torch is there to ask."""

from __future__ import annotations

import os

# What launchers call the number of processes that they start, and this one's place among them.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def num_processes() -> int:
    """Return how many processes were started together."""
    # Without a rank each task of a SLURM step would train alone.
    slurm = () if "RANK" in os.environ else ("SLURM_STEP_NUM_TASKS",)
    return max(int(os.environ.get(name) or 1) for name in (*_SIZES, *slurm))


def is_first() -> bool:
    """Return whether this is the process that speaks for all."""
    return not any(int(os.environ.get(name) or 0) for name in _RANKS)
