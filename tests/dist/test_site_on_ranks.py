"""A site's client is a real DeepSpeed job, under any launcher, to the bits of the simulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from safetensors.torch import load_file
from sites import write_federation

from fedex_scale.runtime.distributed import free_port
from fedex_scale.sites.server_round import server_round

WEIGHTS = "adapter_model.safetensors"
OPTIONS = ["engine.deepspeed=zero2", "federation.rounds=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_of_zero2(launcher: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = write_federation(tiny_llama, tmp_path)
    simulation = ["--config", folder / "simulation.yaml", *OPTIONS]
    start(*torchrun(), "run", *simulation)
    server_round(folder / "run", folder / "server.yaml", ["federation.rounds=1"])
    site = ["--config", folder / "site-1.yaml", "--server", folder / "run" / "sent" / "round-0001"]
    site += ["--out", folder / "out", *OPTIONS]
    if launcher == "torchrun":
        start(*torchrun(), "client-round", *site)
    else:
        program = ROOT / "launch" / "client_round.py"
        start(command("deepspeed"), "--num_gpus", 2, "--master_port", free_port(), program, *site)
    expected = load_file(folder / "simulation/clients/round-0001/client-0001" / WEIGHTS)
    got = load_file(folder / "out" / WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(got[name].equal(expected[name]) for name in expected)


def torchrun() -> list[object]:
    port = ["--master-port", free_port(), command("fedex-scale")]
    return [sys.executable, *TORCHRUN, *port]


def command(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def start(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
