"""A federation over Flower: carries directories, and calls the commands that make them.

    at the server   fedex-scale server-round RUN
    at a site       [its launcher] fedex-scale client-round --config ... --server ... --out ...

It imports flwr alone, so that flwr has an environment of its own, and fedex_scale another. All that
counts lies in RUN and at the sites: whatever is killed, `flwr run` once more goes on.
"""

import ctypes
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from .gather import gather
from .pieces import RETURNED, SENT, part_of, read_part, sizes_of, write_part

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Do the rounds that are not done yet."""
    settings = context.run_config
    run = Path(str(settings["run"]))
    _call_server(settings, "--config", str(settings["config"]))
    while (number := open_round(run)) is not None:
        gather(grid, settings, run, number)
        _call_server(settings)
    print(f"finished: {run / 'final'}", flush=True)


@client.query("take")
def take(message: Message, context: Context) -> Message:
    """Put a piece of the server's state where it belongs."""
    folder = Path(str(context.node_config["folder"]))
    part, state = part_of(message.content, SENT), _state(folder, message)
    with _alone(folder):
        if not state.exists():
            for path in (folder / "server", folder / "out"):
                shutil.rmtree(path, ignore_errors=True)
        write_part(message.content, part, state)
    return Message(RecordDict({}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train this site's client, in processes of its own, and tell the sizes of what it sends."""
    site = context.node_config
    folder = Path(str(site["folder"]))
    out = folder / "out"
    with _alone(folder):  # Flower may ask twice: the second finds the first one's result
        shutil.rmtree(out, ignore_errors=True)
        command = [*shlex.split(str(site["command"])), "client-round", "--config"]
        command += [str(site["config"]), "--server", str(_state(folder, message))]
        command += ["--out", str(out)]
        code = _call(command)
        if code:  # why, is in this site's own log; it may tell of its data
            content = {"failed": ConfigRecord({"code": code})}
        else:
            content = {"sizes": ConfigRecord(sizes_of(out, RETURNED))}
    return Message(RecordDict(content), reply_to=message)


@client.query("give")
def give(message: Message, context: Context) -> Message:
    """Return a piece of what this site sends."""
    folder = Path(str(context.node_config["folder"]))
    with _alone(folder):
        content = read_part(folder / "out", part_of(message.content, RETURNED))
    return Message(content, reply_to=message)


def open_round(run: Path) -> int | None:
    """Return the round whose results are awaited, or None where all are done."""
    if (run / "final").is_dir():
        return None
    return max(int(path.name.removeprefix("round-")) for path in (run / "sent").glob("round-*"))


def _state(folder: Path, message: Message) -> Path:
    """Return where a state lies: by its hash, so that a piece that comes twice changes nothing.

    Raises:
        ValueError: no hash.
    """
    name = str(message.content["state"]["sha256"])
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise ValueError("expected a state by its SHA-256")
    return folder / "server" / name


def _call_server(settings: dict, *options: str) -> None:
    command = [*shlex.split(str(settings["command"])), "server-round", str(settings["run"])]
    if code := _call([*command, *options]):
        raise RuntimeError(f"server-round ended with exit code {code}; its last line says why")


def _call(command: list[str]) -> int:
    """Run a command that ends when this process does, or its parent, and return its exit code.

    A SuperNode that is killed leaves its ClientApp, whose answer nobody takes.
    """
    libc = ctypes.CDLL(None)
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    process = subprocess.Popen(
        command, preexec_fn=lambda: libc.prctl(set_death_signal, signal.SIGTERM)
    )
    parent = os.getppid()
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=1)
        if os.getppid() != parent:
            process.terminate()
            return process.wait()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
