"""How much host memory a run needs with 3 clients, and with 30.

    .venv/bin/python benchmarks/host_memory.py [--model models/SmolLM2-135M-Instruct] [--quick]

Runs launch/instruct.py in processes of their own, and reports the largest resident size that the
system saw of each. Every client trains a few steps on as many examples of equal length, one round
of fedex follows, and the final adapters are written. The side adapter has the same rank in both
runs: by default it grows with the clients up to 128, and is a part of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import yaml
from common import Figure, Ratio, in_turns, quotients, report, start

from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
FEW, MANY = 3, 30
RANK, SIDE_RANK = 32, 64
EXAMPLES, BATCH_SIZE, LENGTH = 4, 2, 64  # of each client; LENGTH cuts every example alike


def benchmark(args: argparse.Namespace) -> None:
    many = 2 * FEW if args.quick else MANY
    runs = [partial(measure_run, args.model, num_clients) for num_clients in (FEW, many)]
    values = in_turns(runs, 1 if args.quick else 2)
    few, many = values
    report(
        __file__,
        f"{args.model}, float32, LoRA of rank {RANK}, side adapter of rank {SIDE_RANK}, "
        f"{EXAMPLES} examples of {LENGTH} tokens a client",
        [Figure(name=name, values=mb, unit="MB") for name, mb in values.items()],
        [Ratio(name=f"{many} / {few}", values=quotients(values[many], values[few]), at_most=1.02)],
    )


def measure_run(model: str, num_clients: int) -> dict[str, float]:
    """Return the peak resident size of one run in MB, by what was run.

    Raises:
        UserError: the run failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_rows(directory / "rows.jsonl", EXAMPLES * num_clients)
        config, log = directory / "run.yaml", directory / "log"
        config.write_text(yaml.safe_dump(settings(model, directory, num_clients)))
        command = [sys.executable, ROOT / "launch" / "instruct.py", "--config", config]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"launch/instruct.py failed: {log.read_text()[-2000:].strip()}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {f"{num_clients} clients": usage.ru_maxrss * unit / 1e6}


def settings(model: str, directory: Path, num_clients: int) -> dict:
    return {
        "run": {"dir": str(directory / "runs")},
        "model": {"path": model, "dtype": "float32"},
        "lora": {"rank": RANK},
        "data": {
            "path": str(directory / "rows.jsonl"),
            "schema": "columns",
            "prompt_column": "query",
            "response_column": "response",
            "max_length": LENGTH,
            "max_dropped": 0.995,  # nearly all are cut there
            "holdout": 0,
        },
        "partition": {"kind": "contiguous", "num_clients": num_clients},
        "train": {"batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE, "warmup_ratio": 0.0},
        "aggregate": {"side_rank": SIDE_RANK},
    }


def write_rows(path: Path, count: int) -> None:
    """Write rows that differ, each longer than `LENGTH` tokens but for one of a hundred."""
    with path.open("w") as file:
        for start in range(count):
            count_to = 4 if start % 100 == 0 else LENGTH
            numbers = " ".join(map(str, range(start, start + count_to)))
            file.write(json.dumps({"query": f"Count from {start}.", "response": numbers}) + "\n")


if __name__ == "__main__":
    start(__doc__, benchmark)
