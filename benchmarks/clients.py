"""What the number of clients costs: peak memory and time a client, at 10, 100 and 1,000 of them.

    python benchmarks/clients.py [--quick] [--fold round] [--layer 4096x14336]

One layer, aggregated by `fedex-scale aggregate` in a process of its own, from adapters on disk.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import Figure, Ratio, report, start
from files import run_measured, write_adapter, write_base

RANK = 32


def benchmark(args: argparse.Namespace) -> None:
    num_out, num_in = map(int, args.layer.split("x"))
    counts = (4, 40) if args.quick else tuple(map(int, args.counts.split(",")))
    if args.quick:
        num_out, num_in = 256, 512
    shapes = {"model.layers.0.mlp.down_proj": (num_out, num_in)}
    memory, seconds = {}, {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        write_base(scratch / "base", shapes, {}, files=1)
        clients = []
        for k in range(max(counts)):
            clients.append(scratch / f"client-{k}")
            write_adapter(clients[-1], shapes, rank=RANK, seed=k)
            if k + 1 in counts:
                out = scratch / f"out-{k}"
                where = ["--base", scratch / "base", "--out", out]
                done = run_measured(["aggregate", "--fold", args.fold, *where, *clients])
                memory[k + 1] = done.peak_mb
                seconds[k + 1] = done.report_of(out)["seconds"]
    few, *more = counts
    report(
        __file__,
        f"one layer of {num_out} x {num_in} bf16, rank {RANK}, fold: {args.fold}",
        [
            *(Figure(name=f"{k} clients: peak", values=[v], unit="MB") for k, v in memory.items()),
            *(
                Figure(name=f"{k} clients: time a client", values=[v / k * 1e3], unit="ms")
                for k, v in seconds.items()
            ),
        ],
        [
            ratio
            for k in more
            for ratio in (
                Ratio(
                    name=f"peak, {k} / {few} clients",
                    values=[memory[k] / memory[few]],
                    at_most=1.05,
                ),
                Ratio(
                    name=f"time a client, {k} / {few} clients",
                    values=[seconds[k] / k / (seconds[few] / few)],
                    at_most=1.2,
                ),
            )
        ],
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    start(
        __doc__,
        benchmark,
        counts={"default": "10,100,1000", "help": "numbers of clients (%(default)s)"},
        fold={"default": "round", "help": "side, carry or round (%(default)s)"},
        layer={"default": "4096x14336", "help": "out x in (%(default)s)"},
        scratch={"default": None, "help": "directory with 3 GB of room; the system's, if none"},
    )
