"""What carrying a round costs over Flower, and how much memory the server takes.

    .venv/bin/python benchmarks/federation.py [--flower .flower/bin] [--sizes 40,400] [--quick]

The carrier: two sites on loopback, with TLS and keys, send each other nothing but files of a size;
the commands are stand-ins that take no time, so that what is left is Flower. Memory is the largest
resident size of each of Flower's processes, by /proc.
The server: `fedex-scale server-round` at SmolLM2-135M's shapes and rank 32 (39 MB an adapter), in a
process of its own, with 3 and with 30 results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import Figure, Ratio, in_turns, quotients, report, start

from fedex_scale.files.adapter_writers import AdapterWriter
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime.errors import UserError
from fedex_scale.sites.sent import read_sent
from fedex_scale.sites.server_round import server_round

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "launch"))
from federation import Loopback  # noqa: E402

FEW, MANY, RANK, SIDE_RANK = 3, 30, 32, 64
PROCESSES = ("flower-superlink", "flower-supernode", "flwr-clientapp", "flwr-serverapp")
WAIT_S = 900.0
STAND_IN = """
import json, os, pathlib, sys, time
size, out, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
def put(folder, told, **content):
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(size))
    told.write_text(json.dumps(content))
if arguments[0] == "federate":
    os.execv(sys.executable, [sys.executable, "-m", "fedex_scale.cli", *arguments])
if arguments[0] == "client-round":
    folder = pathlib.Path(arguments[-1])
    put(folder, folder / "client.json", client=int(arguments[2]))
else:
    run = pathlib.Path(arguments[1])
    sent = run / "sent" / "round-0001"
    if not sent.exists():
        put(sent / "adapter", sent / "server.json", clients=2)
        pathlib.Path(out).write_text(str(time.time()))
    elif len(arguments) == 2:
        pathlib.Path(out).write_text(str(time.time() - float(pathlib.Path(out).read_text())))
        (run / "final").mkdir()
"""


def benchmark(args: argparse.Namespace) -> None:
    figures: list[Figure] = []
    flower = Path(args.flower)
    if (flower / "flower-superlink").exists():
        for size in [int(x) for x in args.sizes.split(",")][: 1 if args.quick else None]:
            seconds, peaks = carry(flower, size)
            print(f"{size} MB: {seconds:.1f} s, {peaks}", flush=True)
            figures.append(Figure(name=f"{size} MB: round", values=[seconds], unit="s"))
            figures += [
                Figure(name=f"{size} MB: {name}", values=[mb], unit="MB")
                for name, mb in peaks.items()
            ]
    else:
        print(f"no Flower in {flower}: make flower; the carrier is left out")
    many = 2 * FEW if args.quick else MANY
    values = in_turns([partial(serve, count) for count in (FEW, many)], 1)
    few, many = values
    figures += [Figure(name=name, values=mb, unit="MB") for name, mb in values.items()]
    ratio = Ratio(name=f"{many} / {few}", values=quotients(values[many], values[few]), at_most=1.1)
    report(__file__, f"server: LoRA of rank {RANK}, side adapter {SIDE_RANK}", figures, [ratio])


def carry(flower: Path, megabytes: int) -> tuple[float, dict[str, float]]:
    """Return a round's seconds, from the first message to the last result, and peaks in MB."""
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "server.yaml").write_text(
            json.dumps({"model": {"config": "smollm2-135m", "random": True}})
        )
        took = folder / "took"
        program = f"{sys.executable} {folder / 'stand_in.py'} {megabytes * 10**6} {took}"
        with Loopback(folder / "loopback", folder / "server.yaml", flower, program) as sites:
            sites.start_superlink()
            for k in range(2):
                sites.register(k)
                sites.start_supernode(k, Path(str(k)))
            sites.start_run()
            end = time.monotonic() + WAIT_S
            while not (sites.run / "final").is_dir():
                see_peaks(str(folder), peaks)
                if time.monotonic() > end or sites.processes["run"].poll() is not None:
                    logs = sites.log("run")[-500:], sites.log("superlink")[-1500:]
                    raise UserError(f"Flower's run ended: {logs}")
                time.sleep(0.1)
            see_peaks(str(folder), peaks)
        return float(took.read_text()), peaks


def see_peaks(word: str, peaks: dict[str, float]) -> None:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode(errors="replace")
            name = next((x for x in PROCESSES if x in line), None)
            if name and (word in line or word in (path / "environ").read_text(errors="replace")):
                told = (path / "status").read_text().partition("VmHWM:")[2].split()
                peaks[name] = max(peaks.get(name, 0.0), int(told[0]) / 1e3)
        except (OSError, IndexError):
            continue


def serve(count: int) -> dict[str, float]:
    """Return the peak resident size of a server-round with so many results, in MB."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = {
            "model": {"config": "smollm2-135m", "random": True, "dtype": "float32"},
            "lora": {"rank": RANK},
            "partition": {"num_clients": count},
            "aggregate": {"side_rank": SIDE_RANK},
            "federation": {"rounds": 2},
        }
        (folder / "server.yaml").write_text(json.dumps(config))
        run = folder / "run"
        server_round(run, folder / "server.yaml", say=lambda line: None)
        sent, started = read_sent(run / "sent" / "round-0001")
        for k in range(count):
            told = {"format": 1, "start": started, "round": 1, "client": k, "num_examples": 10}
            told |= {"num_steps": 1, "num_tokens": 9, "seconds": 1.0}
            told |= {"first_loss": 1.0, "last_loss": 1.0}
            out = run / "arrived" / "round-0001" / str(k)
            draw = torch.Generator().manual_seed(k)
            shapes = {layer: tuple(shape) for layer, shape in sent.layers.items()}
            with AdapterWriter(out, shapes, rank=RANK, alpha=sent.alpha, base="") as writer:
                for layer, (rows, columns) in shapes.items():
                    A = 0.02 * torch.randn(RANK, columns, generator=draw)
                    writer.write(layer, Pair(A, 0.02 * torch.randn(rows, RANK, generator=draw)))
            (out / "client.json").write_text(json.dumps(told))
        command = [sys.executable, "-m", "fedex_scale.cli", "server-round", str(run)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"server-round ended with exit code {process.returncode}")
        return {f"server, {count} results": usage.ru_maxrss / 1e3}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start(
        __doc__,
        benchmark,
        flower={"default": ".flower/bin", "help": "bin of Flower's environment (%(default)s)"},
        sizes={"default": "40,400", "help": "MB of an adapter (%(default)s)"},
    )
