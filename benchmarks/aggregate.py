"""Aggregate into a checkpoint of Mistral-7B's shapes: peak memory, and time against bare work.

    python benchmarks/aggregate.py [--layers 32] [--quick] [--scratch DIR]

Makes a random bf16 checkpoint (14.5 GB in 3 files at 32 layers) and three clients of rank 32,
deleted afterwards. Bare work is a plain sequential copy of the files, and the product of every
layer's stacked factors into a ready buffer.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
from common import Figure, Ratio, in_turns, quotients, report, start
from files import Shapes, mistral_shapes, run_measured, write_adapter, write_base

from fedex_scale.runtime.errors import UserError

RANK, CLIENTS = 32, 3
BUFFER_BYTES = 2**24


def benchmark(args: argparse.Namespace) -> None:
    num_layers = 1 if args.quick else args.layers
    layers, others = mistral_shapes(num_layers)
    size = 2 * sum(math.prod(shape) for shape in (*layers.values(), *others.values()))
    parent = Path(args.scratch or tempfile.gettempdir())
    free = shutil.disk_usage(parent).free
    if free < 2.3 * size:
        raise UserError(
            f"scratch: expected {2.3 * size / 1e9:.0f} GB of room in {parent}, got "
            f"{free / 1e9:.0f}; choose another --scratch, or fewer --layers"
        )
    with tempfile.TemporaryDirectory(dir=parent) as name:
        scratch = Path(name)
        write_base(scratch / "base", layers, others, files=3)
        clients = [scratch / f"client-{k}" for k in range(CLIENTS)]
        for k, client in enumerate(clients):
            write_adapter(client, layers, rank=RANK, seed=k)
        peaks: dict[str, list[float]] = {}

        def aggregate(fold: str) -> dict[str, float]:
            out = scratch / "out"
            done = run_measured(
                ["aggregate", "--fold", fold, "--base", scratch / "base", "--out", out, *clients]
            )
            shutil.rmtree(out)
            peaks.setdefault(fold, []).append(done.peak_mb)
            return {f"aggregate, fold: {fold}": done.seconds}

        values = in_turns(
            [
                lambda: {"copy of the files": copy_files(scratch / "base", scratch / "copy")},
                lambda: {"products": products(layers, (CLIENTS - 1) * RANK)},
                lambda: aggregate("round"),
                lambda: aggregate("side"),
            ],
            args.repeats,
        )
    bare = [a + b for a, b in zip(values["copy of the files"], values["products"], strict=True)]
    report(
        __file__,
        f"Mistral-7B's shapes, {num_layers} layers, {size / 1e9:.1f} GB bf16, {CLIENTS} clients of "
        f"rank {RANK}",
        [
            *(Figure(name=n, values=v, unit="s") for n, v in values.items()),
            *(Figure(name=f"peak, fold: {n}", values=v, unit="MB") for n, v in peaks.items()),
        ],
        [
            *(
                Ratio(
                    name=f"{fold}: time / (copy + products)",
                    values=quotients(values[f"aggregate, fold: {fold}"], bare),
                    at_most=1.5,
                )
                for fold in peaks
            ),
            *(
                Ratio(name=f"{fold}: peak in GB", values=[x / 1e3 for x in v], at_most=1.5)
                for fold, v in peaks.items()
            ),
        ],
    )


def copy_files(source: Path, out: Path) -> float:
    """Copy all files through a plain buffer, one after another; return the seconds."""
    out.mkdir()
    buffer = bytearray(BUFFER_BYTES)
    began = time.perf_counter()
    for file in sorted(source.iterdir()):
        with (
            file.open("rb", buffering=0) as reader,
            (out / file.name).open("wb", buffering=0) as writer,
        ):
            while count := reader.readinto(buffer):
                writer.write(memoryview(buffer)[:count])
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def products(layers: Shapes, rank: int) -> float:
    """Multiply factors of every layer's shape into ready buffers; return the seconds."""
    seconds = 0.0
    for num_out, num_in in layers.values():
        U_OP, V_PI = torch.randn(num_out, rank), torch.randn(rank, num_in)
        buffer_OI = torch.zeros(num_out, num_in)
        began = time.perf_counter()
        torch.mm(U_OP, V_PI, out=buffer_OI)
        seconds += time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    start(
        __doc__,
        benchmark,
        layers={"type": int, "default": 32, "help": "decoder layers (%(default)s)"},
        repeats={"type": int, "default": 1, "help": "(%(default)s)"},
        scratch={"default": None, "help": "directory with 34 GB of room; the system's, if none"},
    )
