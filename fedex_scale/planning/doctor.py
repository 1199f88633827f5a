"""`fedex-scale doctor`: what this machine has, what a config needs, and how to get the rest."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedex_scale.config.settings import Config
from fedex_scale.engine import models, ops
from fedex_scale.engine.ds_config import read_ds_config, read_settings
from fedex_scale.planning import choice
from fedex_scale.planning.machine import describe_machine
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import evaluation
from fedex_scale.tasks.all import kind_without_rows

HUB = "https://huggingface.co"
STALE_LOCK_S = 600
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Fields:
        remedy: what to do where something is missing; None where all is well.
        fatal: the chosen config cannot run without it.
    """

    name: str
    text: str
    remedy: str | None = None
    fatal: bool = False

    def __str__(self) -> str:
        mark = "FAIL" if self.fatal else "note" if self.remedy else "ok"
        return f"{mark:4}  {self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def examine(config: Config | None) -> Iterator[Finding]:
    """Yield what is found, one thing after another; none is an exception."""
    yield _python()
    yield Finding("torch", version("torch"))
    yield from _cuda()
    yield from _deepspeed(config)
    yield from _bitsandbytes(config)
    yield from _hub()
    if config is not None:
        yield from _config(config)
    yield from _room(config)


def _python() -> Finding:
    text = ".".join(map(str, sys.version_info[:3]))
    too_old = sys.version_info < (3, 10)
    return Finding("python", text, "install 3.10 or newer" if too_old else None, too_old)


def _cuda() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        remedy = "for a GPU, install torch's CUDA build and the driver" if _has_gpu() else None
        yield Finding("CUDA", "none: runs use the CPU", remedy)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        text = f"{name}, {free / _GB:.1f} of {total / _GB:.1f} GB free"
        busy = "another process uses it; end that or choose another" if free < total / 2 else None
        yield Finding(f"GPU {number}", text, busy)


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def _deepspeed(config: Config | None) -> Iterator[Finding]:
    wanted = config is not None and config.engine.deepspeed is not None
    found = _version("deepspeed")
    if found is None:
        remedy = "pip install deepspeed, or engine.deepspeed=null for plain PyTorch"
        yield Finding("DeepSpeed", "not installed", remedy, wanted)
        return
    yield Finding("DeepSpeed", found)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions"))
    built = sorted({file.stem for file in cache.rglob("*.so")})
    tools = {"ninja": _version("ninja") or shutil.which("ninja"), "a C++ compiler": _compiler()}
    missing = [name for name, there in tools.items() if not there]
    remedy = (
        f"install {' and '.join(missing)}, with which the first run compiles" if missing else None
    )
    text = ", ".join(built) if built else "none compiled yet; the first run takes minutes longer"
    yield Finding("DeepSpeed's ops", text, remedy, bool(wanted and missing and not built))
    if config is not None and _on_nvme(config):
        lacks = ops.lacks_for_aio()
        what = "can be built" if lacks is None else "cannot be built"
        yield Finding("DeepSpeed's AIO (NVMe)", what, lacks, lacks is not None)
    for lock in cache.rglob("lock"):
        age = time.time() - lock.stat().st_mtime
        remedy = f"if nothing compiles now: rm {lock}"
        stale = age > STALE_LOCK_S
        text = f"{lock} is {age / 60:.0f} min old: a start waits for it"
        yield Finding("DeepSpeed's ops", text, remedy, wanted and stale)


def _on_nvme(config: Config) -> bool:
    try:
        zero = (read_settings(config.engine.deepspeed) or {}).get("zero_optimization", {})
    except UserError:  # told of with the engine
        return False
    offloads = (zero.get(key) or {} for key in ("offload_param", "offload_optimizer"))
    return any(offload.get("device") == "nvme" for offload in offloads)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _bitsandbytes(config: Config | None) -> Iterator[Finding]:
    wanted = config is not None and (
        config.model.quantization != "none" or config.train.optimizer != "adamw"
    )
    found = _version("bitsandbytes")
    remedy = None if found else "pip install bitsandbytes, for quantized bases and 8-bit optimizers"
    yield Finding("bitsandbytes", found or "not installed", remedy, wanted and not found)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", "not asked, as HF_HUB_OFFLINE is set")
    else:
        address = os.environ.get("HF_ENDPOINT", HUB)
        try:
            urllib.request.urlopen(address, timeout=5).close()
            yield Finding("hub", f"{address} answers")
        except (OSError, ValueError):
            remedy = "name local directories, or set HF_ENDPOINT or a proxy"
            yield Finding("hub", f"{address} does not answer", remedy)
    there = get_token() is not None
    remedy = None if there else "for gated models: hf auth login, or set HF_TOKEN"
    yield Finding("hub token", "present" if there else "none", remedy)


def _config(config: Config) -> Iterator[Finding]:
    """Try what a run checks before it trains."""
    checks = {
        "model": lambda: _check_model(config),
        "evaluation": lambda: evaluation.check_tasks(config.evaluation),
        "engine": lambda: _check_engine(config),
    }
    for name, check in checks.items():
        try:
            check()
            yield Finding(name, "can be used")
        except UserError as error:
            yield Finding(name, str(error), fatal=True)


def _check_model(config: Config) -> None:
    kind = kind_without_rows(config)
    models.check_kind(config.model, kind)
    models.load_processor(config.model, kind)
    if config.train.packing:
        models.check_packing(config.model)


def _check_engine(config: Config) -> None:
    if config.engine.deepspeed:
        read_ds_config(
            config.engine,
            micro_batch_size=config.train.at_once(config.data.max_length),
            accumulation=1,
            max_grad_norm=config.train.max_grad_norm,
            bf16=models.resolve_dtype(config.model) == torch.bfloat16,
            largest_weight=1,
            quantization=config.model.quantization,
        )


def _room(config: Config | None) -> Iterator[Finding]:
    """Compare disk and memory with what the run needs, as `fedex-scale plan` counts it."""
    folder = config.run.path.absolute() if config is not None else Path.cwd()
    while not folder.exists():
        folder = folder.parent
    machine = describe_machine(None, None, None, None, None)
    needed = None
    if config is not None:
        try:
            needed = choice.needs(config, machine)
        except (UserError, OSError, ValueError, RuntimeError):  # found wanting above
            needed = None
    disk = shutil.disk_usage(folder).free
    places = [
        ("disk", "disk", f"GB free at {folder}", disk, "run.dir"),
        ("host", "RAM", "GB available", machine.host_memory or 0, _SMALLER),
    ]
    if not machine.is_cpu:
        free = torch.cuda.mem_get_info()[0]
        places.append(("gpu", "GPU memory", "GB free", free, "engine.deepspeed=zero3_offload"))
    for place, name, what, there, remedy in places:
        total = None if needed is None else needed.total(place)
        yield _compare(name, f"{there / _GB:.1f} {what}", there, total, remedy)


_SMALLER = "a smaller model, or model.quantization (fedex-scale plan says what fits)"


def _compare(name: str, text: str, there: float, needed: float | None, remedy: str) -> Finding:
    if needed is None:
        return Finding(name, text)
    text += f", {needed / _GB:.2f} GB needed"
    lacks = needed > there
    return Finding(name, text, f"change {remedy}" if lacks else None, lacks)


def _version(package: str) -> str | None:
    try:
        return version(package) if importlib.util.find_spec(package) else None
    except PackageNotFoundError:
        return None
