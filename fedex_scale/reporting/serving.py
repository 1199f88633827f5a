"""What to do with what a run hands over: the commands that talk to it and serve it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.basefiles import BaseFiles, base_directory
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime.errors import UserError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""


def rank_limit(rank: int) -> int | None:
    """Return the next of vLLM's limits; None above the last."""
    return next((known for known in VLLM_RANKS if known >= rank), None)


def vllm(base: str, adapter: str, rank: int, name: str) -> str | None:
    """Return the command that serves an adapter beside its base; None if it has too many columns.

    Args:
        name: by which clients ask for the adapter.
    """
    room = rank_limit(rank)
    if room is None:
        return None
    lora = shlex.quote(f"{name}={adapter}")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} --lora-modules {lora}"
    )


def merging(run: str, model: Mapping[str, Any], adapter: Adapter) -> str | None:
    """Return the command that makes one model, for programs that serve no adapters.

    In float32: bfloat16 rounds much of what was trained away (docs/exactness.md). None where the
    adapter has a layer whose weight is the embedding's too: no file could hold both.

    Args:
        model: the run's settings of that name.
    """
    try:
        base = BaseFiles(base_directory(model["path"], model["revision"]))
        if any(map(base.is_tied, adapter.layers)):
            return None
    except UserError:  # it is not here any more
        pass
    return f"fedex-scale export {shlex.quote(run)} --merged --dtype float32 --out merged"


def next_steps(config: Config, run: RunDir, written: Mapping[str, Path]) -> Iterator[str]:
    """Yield a command a line, for what a run has written: by name, what lies where."""
    path = str(run.path)
    yield f"talk to it: fedex-scale chat {shlex.quote(path)}"
    exact = "exact_adapter" in written
    adapter = Adapter(written["exact_adapter" if exact else "adapter"])
    base = str(written["base"]) if "base" in written and not exact else config.model.path
    merge = merging(path, to_dict(config.model), adapter)
    served = vllm(base, str(adapter.path), adapter.rank, config.method.name)
    if served or merge:
        yield f"serve it: {served or f'{merge} && vllm serve merged --dtype float32'}"
    if merge:
        yield f"or: {merge} && transformers serve merged"
