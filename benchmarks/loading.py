"""Memory that each of two ranks needs to load a checkpoint under ZeRO-3, against transformers' way.

    python benchmarks/loading.py [--quick]

Writes a bf16 model of 1.1B random weights in several files (2.2 GB, deleted in the end), and loads
it in processes of their own. Peaks are over the process before the load, with everything imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import Figure, Ratio, forget_peak, memory, report, start
from transformers import LlamaConfig

from fedex_scale.files.tensorfile import SafetensorsWriter
from fedex_scale.runtime.distributed import free_port
from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
RANKS = 2
FILES = 6
ALLOWED_GB = 0.4  # beside the shard
WAYS = {"ours": "read", "from_pretrained": "transformers"}


def benchmark(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        size = write_checkpoint(model, layers=2 if args.quick else 22)
        measured = {name: load(model, way) for name, way in WAYS.items()}
    shard = size / RANKS / 1e9
    peaks = {name: [rank["peak_gb"] for rank in ranks] for name, ranks in measured.items()}
    report(
        __file__,
        f"{size / 1e9:.2f} GB in {FILES} files, bf16, {RANKS} ranks, ds_configs/zero3.json",
        [
            Figure(name="shard", values=[shard], unit="GB"),
            *(Figure(name=f"{n}: peak of a rank", values=v, unit="GB") for n, v in peaks.items()),
            *(
                Figure(name=f"{name}: time", values=[rank["seconds"] for rank in ranks], unit="s")
                for name, ranks in measured.items()
            ),
        ],
        [
            Ratio(
                name="ours / (shard + 0.4 GB)",
                values=[peak / (shard + ALLOWED_GB) for peak in peaks["ours"]],
                at_most=1,
            ),
            Ratio(
                name="from_pretrained / ours",
                values=[a / b for a, b in zip(*reversed(peaks.values()), strict=True)],
            ),
        ],
    )


def write_checkpoint(folder: Path, *, layers: int) -> int:
    """Write a Llama's files, a tensor at a time; return the bytes of its weights."""
    from fedex_scale.config.learning import ModelSection
    from fedex_scale.engine.models import meta_model

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    specs = {
        name: (torch.bfloat16, tuple(p.shape))
        for name, p in meta_model(ModelSection(path=str(folder)), config).named_parameters()
    }
    names, where = list(specs), {}
    draw = torch.Generator().manual_seed(0)
    for number in range(FILES):
        mine = names[len(names) * number // FILES : len(names) * (number + 1) // FILES]
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        where |= dict.fromkeys(mine, file)
        with SafetensorsWriter(folder / file, {name: specs[name] for name in mine}) as writer:
            for name in mine:
                writer.write(name, torch.randn(specs[name][1], generator=draw).mul_(0.02))
    size = sum(2 * torch.Size(shape).numel() for _, shape in specs.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def load(model: Path, way: str) -> list[dict]:
    """Load on two ranks, and return what each measured."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += [f"--master-port={free_port()}", __file__, "--rank-of", way, str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"loading failed: {done.stderr.strip()[-2000:]}")
    return [json.loads((model / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def measure_rank(way: str, model: str) -> None:
    """Load in this process, one of several, and print the peak of its memory and the time."""
    import deepspeed  # noqa: F401  its import is no part of a load

    from fedex_scale.config.learning import EngineSection, ModelSection
    from fedex_scale.engine import loading
    from fedex_scale.engine.ds_config import read_ds_config
    from fedex_scale.runtime import distributed

    distributed.join_group(required=True)
    ds_config = read_ds_config(
        EngineSection(deepspeed=str(ROOT / "ds_configs" / "zero3.json")),
        micro_batch_size=1,
        accumulation=1,
        max_grad_norm=1.0,
        bf16=True,
        largest_weight=1,
    )
    if way == "transformers":
        loading._why_not = lambda model, folder: "as asked"
    section = ModelSection(path=model, dtype="bfloat16")
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    loading.load_base(section, torch.bfloat16, distributed.device(), ds_config)
    seconds = time.perf_counter() - began
    found = {"peak_gb": (memory("VmHWM") - before) / 1e9, "seconds": seconds}
    (Path(model) / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.leave(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        measure_rank(*sys.argv[2:])
    else:
        start(__doc__, benchmark)
