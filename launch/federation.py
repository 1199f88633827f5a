"""Three real sites on this machine: a SuperLink, SuperNodes that it knows by their keys, over TLS.

    python launch/federation.py --flower BIN [--out DIR]

BIN is the `bin` of an environment with flwr 1.42; `make federation` makes one, and calls this. Every
site has rows of its own, trains SmolLM2-135M for a round, and sends nothing but its adapter; the
model is scored before and after. The processes are those of `docs/federation.md`, each with its log
in DIR/logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
WAIT_S = 60.0
SITES = 3


class Loopback:
    """A federation's processes on this machine; all of them end with the `with` block.

    Args:
        folder: made for keys, app, run and logs.
        config: the federation's YAML.
        flower: the directory of Flower's programs.
        program: how fedex-scale starts.
    """

    def __init__(self, folder: Path, config: Path, flower: Path, program: str) -> None:
        self.folder, self.run = folder, folder / "run"
        self._flower, self._program = flower, program
        self._port = free_port()
        self._keys, self._app = folder / "keys", folder / "app"
        self.processes: dict[str, subprocess.Popen] = {}
        (folder / "logs").mkdir(parents=True)
        self._fedex("federate", "keys", self._keys, "--host", HOST, "--sites", SITES)
        address = ["--address", f"{HOST}:{self._port}", "--certificate", self._keys / "ca.pem"]
        self._fedex("federate", "init", self._app, "--config", config, "--run", self.run, *address,
                    "--command", program, "--deadline", 3600)  # fmt: skip

    def __enter__(self) -> Loopback:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.end(name, signal.SIGTERM)

    def start_superlink(self) -> None:
        keys = self._keys
        self._start("superlink", "flower-superlink", "--ssl-ca-certfile", keys / "ca.pem",
                    "--ssl-certfile", keys / "server.pem", "--ssl-keyfile", keys / "server.key",
                    "--enable-supernode-auth", "--disable-runtime-dependency-installation",
                    "--host", HOST, "--port", self._port,
                    "--database", self.folder / "superlink.db")  # fmt: skip
        self._wait_for_port()

    def register(self, site: int) -> None:
        self._flwr("supernode", "register", self._keys / f"site-{site}.pub")

    def start_supernode(self, site: int, config: Path, *, program: str | None = None) -> None:
        node = {"command": program or self._program, "config": config}
        node["folder"] = self.folder / f"exchange-{site}"
        told = " ".join(f"{name}={json.dumps(str(value))}" for name, value in node.items())
        self._start(f"site-{site}", "flower-supernode", "--superlink", f"{HOST}:{self._port}",
                    "--root-certificates", self._keys / "ca.pem", "--port", free_port(),
                    "--auth-supernode-private-key", self._keys / f"site-{site}",
                    "--node-config", told)  # fmt: skip

    def start_run(self) -> None:
        """Let Flower do what is left to do; see `wait`."""
        self._start("run", "flwr", "run", self._app, "--stream")

    def wait(self, seconds: float) -> bool:
        """Wait until the federation is finished, or Flower's run has ended; return whether it is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.processes["run"].poll() is None:
            if (self.run / "final").is_dir():
                break
            time.sleep(0.5)
        return (self.run / "final").is_dir()

    def end(self, name: str, number: int) -> None:
        """Send a process a signal, and wait for its end."""
        process = self.processes.pop(name)
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            process.kill()
            process.wait()

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    @property
    def environment(self) -> dict[str, str]:
        """What Flower's programs see: nothing is told to anybody else."""
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        home = {"FLWR_HOME": str(self._app / ".flwr")}
        path = {"PATH": f"{self._flower}{os.pathsep}{os.environ['PATH']}"}
        return {**os.environ, **quiet, **home, **path}

    def _start(self, name: str, program: str, *arguments: object) -> None:
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            command = [str(self._flower / program), *map(str, arguments)]
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment
            )

    def _flwr(self, *arguments: object) -> str:
        command = [str(self._flower / "flwr"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise SystemExit(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    def _fedex(self, *arguments: object) -> None:
        subprocess.run([*self._program.split(), *map(str, arguments)], check=True)

    def _wait_for_port(self) -> None:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self._port), 1):
                return
            time.sleep(0.2)
        raise SystemExit(f"the SuperLink does not listen: {self.log('superlink')[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
