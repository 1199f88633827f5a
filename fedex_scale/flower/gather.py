"""A round, as the server asks for it: each site is given the state, trains, and gives its result.

A piece of a site is under way at a time, and few of all sites: Flower's processes hold every such
message in memory, up to five times over.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from .pieces import RETURNED, SENT, Part, cut, read_part, record_of, sizes_of, write_part

ATTEMPTS = 3  # of a site in a round, where it told of a failure
LOOK_EVERY_S = 0.2
MIN_PIECE = 6 * 2**20  # bytes
PATIENCE_S = 600.0  # for a piece; training may take until the deadline
NO_RESULT = (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError)


@dataclass
class Ask:
    """What a site is to be asked next.

    Fields:
        state: SHA-256 of the server.json that it is about.
        part: what is to be sent from `source`, or given.
    """

    kind: str
    state: str
    part: Part = field(default_factory=dict)
    source: Path | None = None

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self.part.values())

    def content(self) -> RecordDict:
        content = read_part(self.source, self.part) if self.source else RecordDict({})
        content["part"] = record_of(self.part)
        content["state"] = ConfigRecord({"sha256": self.state})
        return content


@dataclass
class Talk:
    """How far a site's round has come.

    Fields:
        steps: takes each answer, and yields what to ask next.
        message: that is under way, if there is one.
        since: when it was sent.
    """

    who: "Node"
    steps: Generator[Ask, RecordDict, None]
    ask: Ask
    message: str = ""
    since: float = 0.0

    @property
    def is_late(self) -> bool:
        waits = bool(self.message) and self.ask.kind != "train"
        return waits and time.monotonic() - self.since > PATIENCE_S

    @classmethod
    def begin(cls, who: "Node", sent: Path, arrived: Path, run: Path, node: int) -> "Talk":
        steps = _steps(who, sent, arrived, run, node)
        return cls(who, steps, next(steps))


def _steps(
    who: "Node", sent: Path, arrived: Path, run: Path, node: int
) -> Generator[Ask, RecordDict, None]:
    """Give a site the server's state, have it train, and put its result in its place.

    Raises:
        ValueError and others of NO_RESULT: what it sends is not a result.
    """
    state = hashlib.sha256((sent / "server.json").read_bytes()).hexdigest()
    sizes = sizes_of(sent, SENT)
    total = sum(sizes.values())
    piece = MIN_PIECE + total // 16
    for part in cut(sizes, piece):
        yield Ask("query.take", state, part, sent)
    answer = yield Ask("train", state)
    if "failed" in answer:
        raise ValueError("it failed; its own log says why")
    told = {name: int(size) for name, size in answer["sizes"].items()}
    most = 2 * total + 2**20
    if not set(told) <= RETURNED or min(told.values()) < 1 or sum(told.values()) > most:
        raise ValueError(f"expected sizes of {sorted(RETURNED)}, at most {most} bytes in all")
    scratch = arrived / f".node-{node}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for part in cut(told, piece):
            answer = yield Ask("query.give", state, part)
            write_part(answer, part, scratch)
        number = int(json.loads((scratch / "client.json").read_text())["client"])
        _pin(run, number, who)
        shutil.rmtree(arrived / _name(number), ignore_errors=True)  # of one who had no right to it
        scratch.rename(arrived / _name(number))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"node {node}: has sent the result of client {number}", flush=True)


def gather(grid: Grid, settings: dict, run: Path, number: int) -> None:
    """Ask every site for its result of a round, and put it where the server looks for it.

    Returns when all have sent theirs, failed often enough, or the deadline is over.
    """
    sent, arrived = (run / name / f"round-{number:04d}" for name in ("sent", "arrived"))
    arrived.mkdir(parents=True, exist_ok=True)
    sites = json.loads((sent / "server.json").read_text())["clients"]
    room = MIN_PIECE + sum(sizes_of(sent, SENT).values()) // 4  # bytes that may be under way
    end = time.monotonic() + float(settings["deadline-s"])
    talks: dict[int, Talk] = {}
    failures: dict[int, int] = {}
    while time.monotonic() < end:
        done = _done(arrived, run)
        given_up = {node for node, count in failures.items() if count >= ATTEMPTS}
        if len(done) + len(given_up) >= sites:
            return
        for node in grid.get_nodes():
            who = Node.of(node)
            if node.node_id not in talks.keys() | given_up and who.key not in done:
                talks[node.node_id] = Talk.begin(who, sent, arrived, run, node.node_id)
                print(f"round {number}: asked node {node.node_id}, {who.name!r}", flush=True)
        _push(grid, talks, room, ttl=max(60.0, end - time.monotonic()), group=str(number))
        for node, talk in list(talks.items()):
            replies = list(grid.pull_messages([talk.message])) if talk.message else []
            if (replies or talk.is_late) and not _go_on(talk, replies, node, failures):
                del talks[node]
        time.sleep(LOOK_EVERY_S)
    print(f"round {number}: the deadline is over", flush=True)


def _push(grid: Grid, talks: Mapping[int, Talk], room: int, *, ttl: float, group: str) -> None:
    """Ask the sites that wait, as far as there is room for what is then under way."""
    under_way = sum(talk.ask.num_bytes for talk in talks.values() if talk.message)
    for node, talk in talks.items():
        if talk.message or (under_way and under_way + talk.ask.num_bytes > room):
            continue
        message = Message(talk.ask.content(), node, talk.ask.kind, ttl=ttl, group_id=group)
        (talk.message,), talk.since = grid.push_messages([message]), time.monotonic()
        under_way += talk.ask.num_bytes


def _go_on(talk: Talk, replies: list[Message], node: int, failures: dict[int, int]) -> bool:
    """Take a site's answer, or that there is none; return whether there is more to ask."""
    talk.message = ""
    try:
        if not replies:
            raise ValueError(f"no answer for {PATIENCE_S:.0f} s")
        (reply,) = replies
        if reply.has_error():
            raise ValueError(f"{reply.error.code}: {reply.error.reason}")
        talk.ask = talk.steps.send(reply.content)
        return True
    except StopIteration:
        return False
    except NO_RESULT as problem:
        print(f"node {node}: no result ({str(problem)[:200]!r})", flush=True)
        failures[node] = failures.get(node, 0) + 1
        return False


def _pin(run: Path, number: int, who: "Node") -> None:
    """Bind a client's number to the node of that name, or else to the first one that uses it.

    Raises:
        ValueError: the number, or the key, belongs to another.
    """
    path = run / "nodes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    named = re.fullmatch(r"site-(\d+)", who.name)
    if named and int(named[1]) == number:
        known[str(number)] = who.key  # whoever used it meanwhile
    known.setdefault(str(number), who.key)
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
