"""Three real sites on this machine: a SuperLink, SuperNodes that it knows by their keys, over TLS.

    .venv/bin/python launch/federation.py --flower BIN [--out DIR]

BIN is the `bin` of an environment with flwr 1.42; `make federation` makes one, and calls this.
Every site has rows of its own, trains SmolLM2-135M for a round, and sends nothing but its adapter;
the model is scored before and after. The processes are those of `docs/federation.md`; their logs
lie in DIR/loopback/logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
WAIT_S = 60.0
SITES = 3
ROWS = ((0, 96), (96, 211), (211, 336))  # of each site
LIMIT_S = 3600.0
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TASK = "fedex_word_problems"


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
        for name in reversed(list(self.processes)):
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
        self._flwr(
            "supernode", "register", "--name", f"site-{site}", self._keys / f"site-{site}.pub"
        )

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
        """Wait for the federation to be finished, or Flower's run to end; return the former."""
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

    def cpu_seconds(self) -> float:
        """Return what the federation's running processes and those they waited for have used."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (path / "environ").read_bytes():
                    fields = (path / "stat").read_text().rpartition(")")[2].split()
                    ticks += sum(map(int, fields[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

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
        # What a SuperLink's many threads free stays with each of them, otherwise.
        frugal = {"MALLOC_ARENA_MAX": "2"} if name == "superlink" else {}
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(self._flower / program), *map(str, arguments)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self.environment | frugal,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flower", type=Path, required=True, help="bin/ of Flower's environment")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "federation")
    arguments = parser.parse_args()
    out, began = arguments.out.resolve(), time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    write_files(out)
    program = f"{sys.executable} -m fedex_scale.cli"
    before = score(out, str(MODEL), "before")
    with Loopback(out / "loopback", out / "server.yaml", arguments.flower, program) as sites:
        sites.start_superlink()
        for k in range(SITES):
            sites.register(k)
            sites.start_supernode(k, out / f"site-{k}.yaml")
        print(f"a SuperLink and {SITES} SuperNodes, authenticated, over TLS; logs: {sites.folder}")
        sites.start_run()
        finished = sites.wait(LIMIT_S)
        print(sites.log("run"))
        if not finished:
            raise SystemExit(f"the federation did not end; {sites.folder / 'logs'} says why")
        run, of_sites = sites.run, sites.cpu_seconds()
    after = score(out, str(run), "after")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime + of_sites
    print(f"fedex_word_problems: {before:.1%} before, {after:.1%} after")
    print(f"{time.monotonic() - began:.0f} s, some {cpu:.0f} s of CPU")
    print(f"run: {run}\nadapter: {run / 'final' / 'adapter'}")


def write_files(out: Path) -> None:
    """Write every site's rows and settings, the server's settings, and the rows to score on."""
    from fedex_scale.data.word_problems import generate, write_jsonl

    rows, heldout = generate(0, train=336, heldout=64)
    write_jsonl(heldout, out / "data" / "word_problems" / "heldout.jsonl")
    shared = {
        "model": {"path": str(MODEL), "dtype": "float32"},
        "lora": {"rank": 32, "alpha": 16},
        "train": {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3},
    }
    server = {"partition": {"num_clients": SITES}, "evaluation": {"tasks": [TASK]}}
    (out / "server.yaml").write_text(json.dumps(shared | server, indent=1) + "\n")
    for k, (first, last) in enumerate(ROWS):
        write_jsonl(rows[first:last], out / f"site-{k}" / "rows.jsonl")
        site = {
            "run": {"name": "rounds", "dir": str(out / f"site-{k}")},
            "data": {"path": str(out / f"site-{k}" / "rows.jsonl"), "max_length": 256},
            "site": {"number": k},
        }
        (out / f"site-{k}.yaml").write_text(json.dumps(shared | site, indent=1) + "\n")


def score(out: Path, what: str, name: str) -> float:
    """Return the share of held-out problems that a model, or a run's, solves."""
    results = out / f"score-{name}"
    command = [sys.executable, "-m", "fedex_scale.cli", "evaluate", what, "--suite", TASK]
    command += ["--data-dir", str(out / "data"), "--batch-size", "32", "--out", str(results)]
    subprocess.run([*command, "--dtype", "float32"], check=True)
    tree = json.loads((results / "results.json").read_text())["results"][TASK]
    return next(value for key, value in tree.items() if key.startswith("exact_match,"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
