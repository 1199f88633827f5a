"""Where a run's time and memory go, by phase, and profiler traces of chosen steps.

A phase within another interrupts it, so that every second counts once. Like logging, it is one
clock per process, so that the code that is timed need not be handed one.
"""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fedex_scale.runtime import distributed

PHASES = (
    "load",
    "client switch",
    "training",
    "writing",
    "folding",
    "evaluating",
    "checkpointing",
    "other",
)
_SIZES = (b"VmHWM:", b"VmRSS:")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count what happens within (or in the decorated function) as that phase."""
    assert name in PHASES
    _CLOCK.switch()
    _CLOCK.running.append(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        _CLOCK.switch()
        _CLOCK.running.pop()


def start() -> None:
    """Forget what was counted; phases that are running go on."""
    _CLOCK.restart()


def lap() -> dict:
    """Return what was counted since the last lap, as plain data, and start anew.

    Returns:
        wall_s, and by phase: seconds, peak_bytes of this process's memory, and with an
        accelerator its peak_device_bytes. A phase in which the process became larger than ever has
        that size as its peak, any other the size at its begin or end: the system's mark is not
        reset, so that it still tells others the truth.
    """
    _CLOCK.switch()
    result = {
        "wall_s": time.perf_counter() - _CLOCK.began,
        "phases": {name: _CLOCK.usage[name].as_dict() for name in PHASES if name in _CLOCK.usage},
    }
    _CLOCK.restart()
    return result


@contextmanager
def profiling(steps: Collection[int], folder: Path) -> Iterator[None]:
    """Within, write a torch profiler trace of these steps, counted from 1, on rank 0."""
    _PROFILE.update(steps=set(steps), folder=folder, done=0)
    try:
        yield
    finally:
        _PROFILE.clear()


@contextmanager
def step() -> Iterator[None]:
    """Mark an optimizer step, which is traced if it was chosen."""
    number = _PROFILE.get("done", 0) + 1
    if _PROFILE:
        _PROFILE["done"] = number
    if number not in _PROFILE.get("steps", ()) or not distributed.is_main():
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    folder = _PROFILE["folder"]
    folder.mkdir(exist_ok=True)
    plain = folder / f".step-{number:04d}.json"
    profile.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(folder / f"step-{number:04d}.json.gz", "wb") as out:
        shutil.copyfileobj(source, out)
    plain.unlink()


@dataclass
class Usage:
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_device_bytes: int = 0

    def as_dict(self) -> dict:
        shown = {"seconds": round(self.seconds, 6), "peak_bytes": self.peak_bytes}
        device = self.peak_device_bytes
        return shown | ({"peak_device_bytes": device} if device else {})


class _Clock:
    def __init__(self) -> None:
        self.running = ["other"]
        self.restart()

    def restart(self) -> None:
        self.usage: dict[str, Usage] = {}
        self.began = self.last = time.perf_counter()
        self.highest, self.resident = _memory()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def switch(self) -> None:
        """Add what has passed since the last switch to the running phase."""
        now = time.perf_counter()
        usage = self.usage.setdefault(self.running[-1], Usage())
        usage.seconds += now - self.last
        highest, resident = _memory()
        peak = highest if highest > self.highest else max(resident, self.resident)
        usage.peak_bytes = max(usage.peak_bytes, peak)
        self.highest, self.resident = highest, resident
        if torch.cuda.is_initialized():
            device = torch.cuda.max_memory_allocated()
            usage.peak_device_bytes = max(usage.peak_device_bytes, device)
            torch.cuda.reset_peak_memory_stats()
        self.last = now


def _memory() -> tuple[int, int]:
    """Return the largest size that this process has had and its size, in bytes of memory.

    Zeros where Linux does not tell.
    """
    try:
        status = Path("/proc/self/status").read_bytes()
        return tuple(1024 * int(status.split(name, 1)[1].split(None, 1)[0]) for name in _SIZES)
    except (OSError, IndexError):
        return 0, 0


_CLOCK = _Clock()
_PROFILE: dict = {}
