"""A federation over Flower: carries directories, and calls the commands that make them.

    at the server   fedex-scale server-round RUN
    at a site       [its launcher] fedex-scale client-round --config ... --server ... --out ...

It imports flwr alone, so that flwr has an environment of its own, and fedex_scale another. All that
counts lies in RUN and at the sites: whatever is killed, `flwr run` once more goes on.

Every file travels as one blob, and replies are pulled one at a time, straight to disk.
"""

import ctypes
import fcntl
import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server = ServerApp()
client = ClientApp()

SENT = frozenset(
    "server.json adapter/adapter_config.json adapter/adapter_model.safetensors "
    "side/adapter_config.json side/adapter_model.safetensors".split()
)
RETURNED = frozenset("client.json adapter_config.json adapter_model.safetensors".split())
ATTEMPTS = 3  # of a site in a round, where it told of a failure
LOOK_EVERY_S = 1.0


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Do the rounds that are not done yet."""
    settings = context.run_config
    run = Path(str(settings["run"]))
    _call_server(settings, "--config", str(settings["config"]))
    while (number := open_round(run)) is not None:
        _gather(grid, settings, run, number)
        _call_server(settings)
    print(f"finished: {run / 'final'}", flush=True)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train this site's client, in processes of its own, and return what it sends."""
    site = context.node_config
    folder = Path(str(site["folder"]))
    with _alone(folder):  # Flower may ask twice: the second finds the first one's result
        sent, out = folder / "server", folder / "out"
        for path in (sent, out):
            shutil.rmtree(path, ignore_errors=True)
        unpack(message.content, sent, SENT)
        command = [*shlex.split(str(site["command"])), "client-round", "--config"]
        command += [str(site["config"]), "--server", str(sent), "--out", str(out)]
        code = _call(command)
        if code:  # why, is in this site's own log; it may tell of its data
            content = RecordDict({"failed": ConfigRecord({"code": code})})
        else:
            content = pack(out, RETURNED)
        for path in (sent, out):
            shutil.rmtree(path, ignore_errors=True)
    return Message(content, reply_to=message)


def open_round(run: Path) -> int | None:
    """Return the round whose results are awaited, or None where all are done."""
    if (run / "final").is_dir():
        return None
    return max(int(path.name.removeprefix("round-")) for path in (run / "sent").glob("round-*"))


def pack(folder: Path, names: frozenset[str]) -> RecordDict:
    """Return a directory's files, a blob each."""
    blobs = {}
    for name in sorted(names):
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            blobs[name] = Array(dtype="uint8", shape=(len(data),), stype="file", data=data)
    return RecordDict({"files": ArrayRecord(blobs)})


def unpack(content: RecordDict, folder: Path, names: frozenset[str]) -> None:
    """Write a directory's files, and let go of each.

    Raises:
        ValueError: a file that is none of those.
    """
    blobs = content["files"]
    if not isinstance(blobs, ArrayRecord) or not set(blobs) <= names:
        raise ValueError(f"expected files of {sorted(names)}")
    for name in list(blobs):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blobs[name].data)
        del blobs[name]


def _gather(grid: Grid, settings: dict, run: Path, number: int) -> None:
    """Ask every site for its result of a round, and put it where the server looks for it.

    Returns when all have sent theirs, failed often enough, or the deadline is over.
    """
    sent, arrived = (run / name / f"round-{number:04d}" for name in ("sent", "arrived"))
    arrived.mkdir(parents=True, exist_ok=True)
    sites = json.loads((sent / "server.json").read_text())["clients"]
    end = time.monotonic() + float(settings["deadline-s"])
    asked: dict[int, tuple[str, Node]] = {}  # by node: the message, and who it is for
    failures: dict[int, int] = {}
    while time.monotonic() < end:
        done = _done(arrived, run)
        given_up = [node for node, count in failures.items() if count >= ATTEMPTS]
        if len(done) + len(given_up) >= sites:
            return
        nodes = {node.node_id: Node.of(node) for node in grid.get_nodes()}
        new = [
            n for n in nodes if n not in asked and n not in given_up and nodes[n].key not in done
        ]
        ttl = max(60.0, end - time.monotonic())
        for node in new:
            message = Message(pack(sent, SENT), node, "train", ttl=ttl, group_id=str(number))
            (identity,) = grid.push_messages([message])
            asked[node] = identity, nodes[node]
            print(f"round {number}: asked node {node}, {nodes[node].name!r}", flush=True)
        for node, (identity, who) in list(asked.items()):
            for reply in grid.pull_messages([identity]):
                del asked[node]
                if not _take(reply, arrived, run, who):
                    failures[node] = failures.get(node, 0) + 1
        time.sleep(LOOK_EVERY_S)
    print(f"round {number}: the deadline is over", flush=True)


def _take(reply: Message, arrived: Path, run: Path, who: "Node") -> bool:
    """Put one site's result in its place; return whether there was one that counts."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        print(f"node {node}: no result ({reply.error.code}: {reply.error.reason})", flush=True)
        return False
    if "failed" in reply.content:
        print(f"node {node}: failed; its own log says why", flush=True)
        return False
    scratch = arrived / f".node-{node}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        unpack(reply.content, scratch, RETURNED)
        number = int(json.loads((scratch / "client.json").read_text())["client"])
        _pin(run, number, who)
        scratch.rename(arrived / _name(number))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        print(f"node {node}: refused ({str(problem)[:200]!r})", flush=True)
        shutil.rmtree(scratch, ignore_errors=True)
        return False
    print(f"node {node}: has sent the result of client {number}", flush=True)
    return True


def _pin(run: Path, number: int, who: "Node") -> None:
    """Bind a client's number to the node of that name, or to the first one that uses it.

    Raises:
        ValueError: the number, or the key, belongs to another.
    """
    path = run / "nodes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(str(number), who.key)
    named = re.fullmatch(r"site-(\d+)", who.name)
    if (named and int(named[1]) != number) or known[str(number)] != who.key:
        raise ValueError(f"client {number} is another node, by its name or by {path}")
    if list(known.values()).count(who.key) > 1:
        raise ValueError(f"this node has another number, by {path}")
    scratch = path.with_name(".nodes.json")
    scratch.write_text(json.dumps(known, indent=1) + "\n")
    scratch.rename(path)


def _done(arrived: Path, run: Path) -> set[str]:
    """Return the keys of the nodes whose results lie there."""
    path = run / "nodes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return {key for number, key in known.items() if (arrived / _name(int(number))).is_dir()}


def _name(number: int) -> str:
    return f"site-{number:04d}"


class Node(NamedTuple):
    """Who a node is.

    Fields:
        key: hash of its key, or of its number where nodes have none.
        name: that it was registered by; site-2 is client 2, whatever a result says.
    """

    key: str
    name: str

    @classmethod
    def of(cls, node: object) -> "Node":
        key = getattr(node, "public_key", b"") or str(node.node_id).encode()
        return cls(hashlib.sha256(key).hexdigest(), getattr(node, "name", ""))


def _call_server(settings: dict, *options: str) -> None:
    command = [*shlex.split(str(settings["command"])), "server-round", str(settings["run"])]
    if code := _call([*command, *options]):
        raise RuntimeError(f"server-round ended with exit code {code}; its last line says why")


def _call(command: list[str]) -> int:
    """Run a command that ends when this process does, and return its exit code."""
    libc = ctypes.CDLL(None)
    set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    process = subprocess.Popen(
        command, preexec_fn=lambda: libc.prctl(set_death_signal, signal.SIGTERM)
    )
    return process.wait()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
