"""What to do with what a run hands over: the commands that talk to it and serve it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedex_scale.config.settings import Config
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be."""


def vllm(base: str, adapter: str, rank: int, name: str) -> str | None:
    """Return the command that serves an adapter beside its base; None if it has too many columns.

    Args:
        name: by which clients ask for the adapter.
    """
    room = next((known for known in VLLM_RANKS if known >= rank), None)
    if room is None:
        return None
    lora = shlex.quote(f"{name}={adapter}")
    return (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {room} --lora-modules {lora}"
    )


def merging(run: str) -> str:
    """Return the command that makes one model, for programs that serve no adapters.

    In float32: bfloat16 rounds much of what was trained away (docs/exactness.md).
    """
    return f"fedex-scale export {shlex.quote(run)} --merged --dtype float32 --out merged"


def next_steps(config: Config, run: RunDir, written: Mapping[str, Path]) -> Iterator[str]:
    """Yield a command a line, for what a run has written: by name, what lies where."""
    path = str(run.path)
    yield f"talk to it: fedex-scale chat {shlex.quote(path)}"
    exact = "exact_adapter" in written
    adapter = written["exact_adapter" if exact else "adapter"]
    base = str(written["base"]) if "base" in written and not exact else config.model.path
    served = vllm(base, str(adapter), Adapter(adapter).rank, config.method.name)
    yield f"serve it: {served or f'{merging(path)} && vllm serve merged --dtype float32'}"
    yield f"or: {merging(path)} && transformers serve merged"
