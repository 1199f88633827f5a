"""`deepspeed --hostfile` over ssh and pdsh: two machines, which are two addresses of this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ROOT, start
from resuming import differing, write_config
from slurm import program

from fedex_scale.runtime.distributed import free_port

MACHINES = ("127.0.0.2", "127.0.0.3")
LACKING = [name for name in ("sshd", "ssh", "ssh-keygen", "pdsh") if program(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"no {', '.join(LACKING)}; apt-get install openssh-server openssh-client pdsh",
    ),
]


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Path]:
    """Give a directory whose `ssh` reaches both machines with a key, as a hostfile expects."""
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir()
    for name in ("host", "user"):
        key = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    server = {
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": folder / "pid",
    }
    lines = [f"{key} {value}" for key, value in server.items()]
    lines += [f"ListenAddress {machine}" for machine in MACHINES]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    client = f"-F none -p {port} -i {folder / 'user'} -o StrictHostKeyChecking=no"
    client += " -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes"
    script = folder / "ssh"
    script.write_text(f'#!/bin/sh\nexec {program("ssh")} {client} "$@"\n')
    script.chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    daemon = subprocess.Popen([program("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")])
    for machine in MACHINES:
        wait_for_port(machine, port)
    yield folder
    daemon.terminate()
    daemon.wait(20)


def wait_for_port(host: str, port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.2)
    pytest.skip(f"sshd does not listen on {host}: this system has no such loopback address")


def test_two_machines_give_the_bits_of_two_ranks_on_one(
    tiny_llama: Path, tmp_path: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tiny_llama, tmp_path)
    zero3 = "engine.deepspeed=zero3"
    one = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    done = start(one, config, "run.name=one", zero3)
    assert done.returncode == 0, done.stderr[-3000:]
    hostfile = tmp_path / "hostfile"
    example = (ROOT / "launch" / "hostfile.example").read_text()
    for name, machine in zip(("node1", "node2"), MACHINES, strict=True):
        example = example.replace(f"{name} slots=8", f"{machine} slots=1")
    hostfile.write_text(example)
    environment = tmp_path / "environment"  # what DeepSpeed sets on the machines
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    told = ["OMP_NUM_THREADS=1", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
    told += [f"TORCH_EXTENSIONS_DIR={extensions}"] if extensions else []
    environment.write_text("\n".join(told) + "\n")
    monkeypatch.setenv("DS_ENV_FILE", str(environment))
    monkeypatch.setenv("PATH", f"{ssh}:{os.environ['PATH']}")
    two = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", MACHINES[0]]
    done = start([*two, "--master_port", str(free_port())], config, "run.name=two", zero3)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for machine in MACHINES:
        assert f"{machine}: " in done.stdout + done.stderr
    assert "2 x cpu" in done.stdout.replace("\n", " ")
    assert differing(tmp_path / "runs" / "one", tmp_path / "runs" / "two") == []
