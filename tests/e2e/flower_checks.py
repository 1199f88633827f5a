"""What the app does with sites of every sort; run by Flower's Python, with the app on its path.

flower_checks.py PACKAGE RUN_FOLDER
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, sys.argv[1])
from flower import gather as rounds
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict


class Site:
    """A site that is given its pieces, and sends what it is told to.

    Args:
        files: its result, by name.
        sizes: that it tells; none: the true ones.
        bend: changes the pieces that it gives.
    """

    def __init__(self, files, sizes=None, bend=lambda content: content):
        self.files, self.bend = files, bend
        self.sizes = {n: len(x) for n, x in files.items()} if sizes is None else sizes
        self.taken = {}

    def answer(self, kind, content):
        if kind == "query.take":
            for name, (offset, _) in content["part"].items():
                known = self.taken.get(name, b"")
                assert len(known) >= offset
                self.taken[name] = known[:offset] + content["blobs"][name].data
            return RecordDict({})
        if kind == "train":
            return RecordDict({"sizes": ConfigRecord(self.sizes)})
        part = {name: tuple(place) for name, place in content["part"].items()}
        data = {n: self.files.get(n, b"")[at : at + size] for n, (at, size) in part.items()}
        return self.bend(RecordDict({"blobs": blobs(data)}))


class Trains(Site):
    """One that answers its training with something else."""

    def __init__(self, answer):
        super().__init__({})
        self.told = answer

    def answer(self, kind, content):
        return self.told if kind == "train" else super().answer(kind, content)


class Silent(Site):
    """One that takes and trains, and then says no more."""


class Grid:
    """A grid of such sites; one that is an Error or None answers with it whatever it is asked.

    Counts how often each is asked to train, or fails before, and what is under way.
    """

    def __init__(self, sites, names):
        self.sites, self.names, self.asked, self.waiting = sites, names, [], {}
        self.most, self.number = 0, 0

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=n, public_key=b"key %d" % n, name=self.names.get(n, ""))
            for n in self.sites
        ]

    def push_messages(self, messages):
        (message,) = messages
        node, site = message.metadata.dst_node_id, self.sites[message.metadata.dst_node_id]
        if message.kind == "train" or not isinstance(site, Site):
            self.asked.append(node)
        self.number += 1
        self.waiting[str(self.number)] = (site, message)
        asked = [m.content["blobs"] for _, m in self.waiting.values() if "blobs" in m.content]
        self.most = max(self.most, sum(len(x.data) for part in asked for x in part.values()))
        return [str(self.number)]

    def pull_messages(self, identities):
        (identity,) = identities
        site, message = self.waiting[identity]
        if site is None or (isinstance(site, Silent) and message.kind == "query.give"):
            return []
        del self.waiting[identity]
        failed = isinstance(site, Error)
        content = None if failed else site.answer(message.kind, message.content)
        return [SimpleNamespace(has_error=lambda: failed, error=site, content=content)]


def blobs(data):
    return ArrayRecord(
        {n: Array(dtype="uint8", shape=(len(x),), stype="file", data=x) for n, x in data.items()}
    )


def result(client):
    told = json.dumps({"client": client}).encode()
    return Site({"client.json": told, "adapter_model.safetensors": bytes(range(256)) * 9})


def other(**records):
    return Site({"client.json": b"{}"}, bend=lambda content: RecordDict(records))


FAILED = RecordDict({"failed": ConfigRecord({"code": 2})})
BAD = {
    "a strange name": Site({"escape.json": b"{}"}),
    "a path": Site({"../../x": b"x"}),
    "no client.json": Site({"adapter_config.json": b"{}"}),
    "no number": Site({"client.json": b'{"client": "x"}'}),
    "no end of a number": Site({"client.json": b'{"client": 1e999}'}),
    "deep": Site({"client.json": b"[" * 100_000}),
    "endless": Site({}, sizes={"client.json": 2**60}),
    "nothing": Site({}, sizes={"client.json": 0}),
    "less than nothing": Site({}, sizes={"client.json": -5}),
    "fewer bytes": Site({"client.json": b"{}"}, sizes={"client.json": 5}),
    "no sizes": Trains(RecordDict({})),
    "another kind of sizes": Trains(RecordDict({"sizes": blobs({"client.json": b"x"})})),
    "sizes that are lists": Trains(RecordDict({"sizes": ConfigRecord({"client.json": [1, 2]})})),
    "another file's piece": other(blobs=blobs({"adapter_config.json": b"{}"})),
    "more bytes": other(blobs=blobs({"client.json": b"{}" * 99})),
    "no pieces": other(),
    "another kind": other(blobs=ConfigRecord({"client.json": 1})),
    "failed": Trains(FAILED),
    "an error": Error(5, "gone"),
}


def gather(folder, answers, deadline=60.0, sites=3, names=()):
    sent = folder / "sent" / "round-0001"
    sent.mkdir(parents=True, exist_ok=True)
    (sent / "server.json").write_text(json.dumps({"clients": sites}))
    (sent / "adapter").mkdir(exist_ok=True)
    (sent / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(251)) * 20)
    grid = Grid(answers, dict(names))
    began = time.monotonic()
    rounds.gather(grid, {"deadline-s": deadline}, folder, 1)
    there = sorted(path.name for path in (folder / "arrived" / "round-0001").iterdir())
    return there, grid, time.monotonic() - began


def ends_with_its_parent(folder: Path) -> None:
    """A command that a ClientApp started ends when the SuperNode is gone that started the app."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(Path(rounds.__file__).parents[1])!r})
from flower.app import _call
if os.fork():
    time.sleep(2)  # the SuperNode, which is killed
    os._exit(0)
_call([sys.executable, "-c", "import os, pathlib, time; "
       "pathlib.Path({str(folder / "pid")!r}).write_text(str(os.getpid())); time.sleep(60)"])
pathlib = __import__("pathlib")
pathlib.Path({str(folder / "ended")!r}).touch()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (folder / "ended").exists():
        time.sleep(0.1)
    assert (folder / "ended").exists()
    assert not Path(f"/proc/{(folder / 'pid').read_text()}").exists()


def main(folder: Path) -> None:
    rounds.LOOK_EVERY_S, rounds.MIN_PIECE = 0.001, 300
    # Flower's own wants to be within a run.
    rounds.Message = lambda content, node, kind, **_: SimpleNamespace(
        metadata=SimpleNamespace(dst_node_id=node), content=content, kind=kind
    )
    sites = {7: result(0), 8: result(1), 9: result(2)}
    there, grid, _ = gather(folder / "all", sites)
    assert there == ["site-0000", "site-0001", "site-0002"], there
    assert sorted(grid.asked) == [7, 8, 9]
    state = folder / "all" / "sent" / "round-0001"
    for number, site in enumerate(sites.values()):
        for got, path in ((site.taken, state), (site.files, folder / "all" / "arrived")):
            path = path / "round-0001" / f"site-{number:04d}" if got is site.files else path
            assert got == {name: (path / name).read_bytes() for name in got}
    whole = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    assert 1200 < grid.most <= whole / 4 + 300, grid.most  # several at once, and not all
    there, grid, _ = gather(folder / "all", {7: result(0), 8: result(1), 9: result(2)})
    assert grid.asked == []  # after a restart nobody is asked again
    for name, answer in BAD.items():
        there, grid, took = gather(folder / name, {7: result(0), 8: answer, 9: result(2)})
        assert there == ["site-0000", "site-0002"], (name, there)
        assert grid.asked.count(8) == rounds.ATTEMPTS, name
        assert took < 30, name  # it is given up, and the deadline not waited for
        assert not list(folder.rglob("x"))
    there, grid, took = gather(folder / "late", {7: result(0), 8: None, 9: result(2)}, 0.5)
    assert there == ["site-0000", "site-0002"]
    assert took < 5
    rounds.PATIENCE_S = 0.05  # one that falls silent does not keep its room
    silent = {node: Silent(result(node).files) for node in (7, 8)}
    there, grid, took = gather(folder / "silent", silent | {9: result(2)})
    rounds.PATIENCE_S = 600.0
    assert there == ["site-0002"]
    assert grid.asked.count(7) == grid.asked.count(8) == rounds.ATTEMPTS
    assert took < 30
    # A node that takes the number of another is refused, in this round and in later ones.
    there, grid, _ = gather(folder / "thief", {7: result(0), 8: result(0), 9: result(2)})
    assert there == ["site-0000", "site-0002"]
    known = json.loads((folder / "thief" / "nodes.json").read_text())
    assert len(known) == 2
    names = {7: "site-1", 8: "site-0", 9: "site-2"}  # by name, the thief is known when it is first
    answers = {7: result(0), 8: result(0), 9: result(2)}
    there, grid, _ = gather(folder / "named", answers, names=names)
    assert there == ["site-0000", "site-0002"]
    assert grid.asked.count(8) == 1
    # A number is that node's which was registered for it, whoever used it first.
    names = {7: "clinic", 8: "site-0", 9: "site-2"}
    answers = {7: result(2), 8: result(0), 9: result(2)}
    there, grid, _ = gather(folder / "squat", answers, names=names)
    assert there == ["site-0000", "site-0002"]
    known = json.loads((folder / "squat" / "nodes.json").read_text())
    assert known["2"] == hashlib.sha256(b"key 9").hexdigest(), known
    # Nobody has two numbers.
    there, grid, _ = gather(folder / "two", {7: result(0)}, sites=1)
    (folder / "two" / "arrived" / "round-0001" / "site-0000").rename(folder / "two" / "away")
    there, grid, _ = gather(folder / "two", {7: result(1)}, sites=1)
    assert there == []
    ends_with_its_parent(folder)
    print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
