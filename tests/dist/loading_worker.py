"""One rank that loads models into ZeRO-3 shards in every way, and writes down what it holds.

    torchrun --nproc-per-node 2 loading_worker.py MODELS OUT

MODELS holds directories named llama, gpt2, missing, wrong and large.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from transformers import PreTrainedModel

from fedex_scale.runtime import distributed
from fedex_scale.engine import loading, models
from fedex_scale.runtime.errors import UserError
from fedex_scale.config.learning import ModelSection

CPU = torch.device("cpu")
OFFLOAD = {"offload_param": {"device": "cpu"}}
KB = 1024


def main(folder: str, out: str) -> None:
    distributed.join_group(required=True)
    results = {}
    for name in ("llama", "gpt2"):
        section = ModelSection(path=f"{folder}/{name}", dtype="float32")
        for dtype in (torch.float32, torch.bfloat16):
            for extra in ({}, OFFLOAD):
                model = load(section, dtype, extra)
                whole = models.load_model(section, dtype, CPU)
                key = f"{name} {dtype} {'offload' if extra else ''}"
                results[key] = differing(model, whole)
    drawn = ModelSection(config=f"{folder}/gpt2", random=True)
    alone = loading.load_base(drawn, torch.float32, CPU, None)
    results["random"] = differing(load(drawn, torch.float32, {}), alone)
    results["spread"] = float(alone.transformer.h[0].mlp.c_fc.weight.std())
    results["errors"] = {name: error_of(folder, name) for name in ("missing", "wrong")}
    results["peak"] = peak_of(lambda: load(ModelSection(path=f"{folder}/large"), torch.float32, {}))
    torch.save(results, Path(out) / f"rank{distributed.rank()}.pt")
    distributed.leave(0)


def load(section: ModelSection, dtype: torch.dtype, extra: dict) -> PreTrainedModel:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, **extra}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    return loading.load_base(section, dtype, CPU, config)


def differing(sharded: PreTrainedModel, whole: PreTrainedModel) -> list[str]:
    """Return what a sharded model does not share with a whole one, bit for bit."""
    found = []
    theirs = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        expected = theirs.pop(name)
        if parameter.ds_tensor.numel() >= expected.numel() > 1:
            found.append(f"{name} is not sharded")
        with deepspeed.zero.GatheredParameters([parameter]):
            if parameter.dtype != expected.dtype or not torch.equal(parameter, expected):
                found.append(name)
    for (name, mine), (other, buffer) in zip(
        sharded.named_buffers(), whole.named_buffers(), strict=True
    ):
        if (name, mine.dtype) != (other, buffer.dtype) or not torch.equal(mine, buffer):
            found.append(name)
    if sharded.generation_config != whole.generation_config or sharded.training:
        found.append("settings")
    return found + list(theirs)


def error_of(folder: str, name: str) -> str:
    try:
        section = ModelSection(path=f"{folder}/{name}")
        distributed.together(lambda: load(section, torch.float32, {}))
    except UserError as error:
        return str(error)
    return ""


def peak_of(call) -> int:
    """Return by how many bytes this process's memory rose at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = call()
    peak = status("VmHWM") - before
    del model
    return peak


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KB * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main(*sys.argv[1:])
