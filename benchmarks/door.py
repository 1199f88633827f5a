"""What the door for files from elsewhere costs `aggregate`: against a version without it.

    git clone . /tmp/before && git -C /tmp/before checkout 39cab1a
    python benchmarks/door.py --before /tmp/before [--layers 4] [--repeats 9]

Three clients at Mistral-7B's shapes, fold: side, in turns; the order changes from turn to turn.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
from pathlib import Path

from common import Figure, Ratio, quotients, report, start
from files import ROOT, mistral_shapes, run_measured, write_adapter, write_base

RANK, CLIENTS = 32, 3


def benchmark(args: argparse.Namespace) -> None:
    num_layers = 1 if args.quick else args.layers
    layers, others = mistral_shapes(num_layers)
    trees = {"before": Path(args.before), "now": ROOT}
    wall: dict[str, list[float]] = {name: [] for name in trees}
    processor: dict[str, list[float]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as scratch:
        base, out = Path(scratch) / "base", Path(scratch) / "out"
        write_base(base, layers, others, files=1)
        clients = [Path(scratch) / f"client-{k}" for k in range(CLIENTS)]
        for k, client in enumerate(clients):
            write_adapter(client, layers, rank=RANK, seed=k)
        command = ["aggregate", "--fold", "side", "--base", base, "--out", out, *clients]
        for turn in range(1 if args.quick else args.repeats):
            for name in list(trees) if turn % 2 else list(trees)[::-1]:
                before = _processor_seconds()
                wall[name].append(run_measured(command, trees[name]).seconds)
                processor[name].append(_processor_seconds() - before)
                shutil.rmtree(out)
    report(
        __file__,
        f"Mistral-7B's shapes, {num_layers} layers, {CLIENTS} clients of rank {RANK}, fold: side",
        [
            *(Figure(name=f"{n}, wall", values=v, unit="s") for n, v in wall.items()),
            *(Figure(name=f"{n}, processor", values=v, unit="s") for n, v in processor.items()),
        ],
        [
            Ratio(name="wall time", values=quotients(wall["now"], wall["before"]), at_most=1.02),
            Ratio(
                name="processor time",
                values=quotients(processor["now"], processor["before"]),
                at_most=1.02,
            ),
        ],
    )


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    start(
        __doc__,
        benchmark,
        before={"required": True, "help": "a checkout of the version to compare with"},
        layers={"type": int, "default": 4, "help": "decoder layers (%(default)s)"},
        repeats={"type": int, "default": 9, "help": "(%(default)s)"},
    )
