"""What the app does with sites of every sort; run by Flower's Python, with the app on its path.

flower_checks.py APP_FOLDER RUN_FOLDER
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, sys.argv[1])
import app
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict


class Sites:
    """A grid whose nodes answer as they are told to.

    Args:
        answers: by node, what it sends each time it is asked; None: nothing, ever.
    """

    def __init__(self, answers, names):
        self.answers, self.names, self.asked, self.waiting = answers, names, [], {}

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=n, public_key=b"key %d" % n, name=self.names.get(n, ""))
            for n in self.answers
        ]

    def push_messages(self, messages):
        (message,) = messages
        node = message.metadata.dst_node_id
        self.asked.append(node)
        identity = f"{node}-{len(self.asked)}"
        self.waiting[identity] = (node, self.answers[node])
        return [identity]

    def pull_messages(self, identities):
        (identity,) = identities
        node, answer = self.waiting.get(identity, (0, None))
        if answer is None:
            return []
        del self.waiting[identity]
        metadata = SimpleNamespace(src_node_id=node)
        failed = isinstance(answer, Error)
        return [
            SimpleNamespace(
                metadata=metadata,
                has_error=lambda: failed,
                error=answer,
                content=None if failed else answer(),
            )
        ]


def files(**blobs):
    arrays = {
        name.replace("__", "/").replace("_json", ".json"): Array(
            dtype="uint8", shape=(len(data),), stype="file", data=data
        )
        for name, data in blobs.items()
    }
    return RecordDict({"files": ArrayRecord(arrays)})


def result(client):
    return lambda: files(client_json=json.dumps({"client": client}).encode())


FAILED = RecordDict({"failed": ConfigRecord({"code": 2})})
BAD = {
    "a strange name": lambda: files(escape__json=b"{}"),
    "a path": lambda: RecordDict(
        {"files": ArrayRecord({"../../x": Array(dtype="u", shape=(1,), stype="f", data=b"x")})}
    ),
    "no client.json": lambda: files(adapter_config_json=b"{}"),
    "no number": lambda: files(client_json=b'{"client": "x"}'),
    "deep": lambda: files(client_json=b"[" * 100_000),
    "no files": lambda: RecordDict({}),
    "another kind": lambda: RecordDict({"files": ConfigRecord({"a": 1})}),
    "failed": lambda: FAILED,
    "an error": Error(5, "gone"),
}


def gather(folder, answers, deadline=60.0, sites=3, names=()):
    sent = folder / "sent" / "round-0001"
    sent.mkdir(parents=True, exist_ok=True)
    (sent / "server.json").write_text(json.dumps({"clients": sites}))
    grid = Sites(answers, dict(names))
    began = time.monotonic()
    app._gather(grid, {"deadline-s": deadline}, folder, 1)
    there = sorted(path.name for path in (folder / "arrived" / "round-0001").iterdir())
    return there, grid, time.monotonic() - began


def main(folder: Path) -> None:
    app.LOOK_EVERY_S = 0.01
    # Flower's own wants to be within a run.
    app.Message = lambda content, node, kind, **_: SimpleNamespace(
        metadata=SimpleNamespace(dst_node_id=node)
    )
    there, grid, _ = gather(folder / "all", {7: result(0), 8: result(1), 9: result(2)})
    assert there == ["site-0000", "site-0001", "site-0002"], there
    assert sorted(grid.asked) == [7, 8, 9]
    there, grid, _ = gather(folder / "all", {7: result(0), 8: result(1), 9: result(2)})
    assert grid.asked == []  # after a restart nobody is asked again
    for name, answer in BAD.items():
        there, grid, took = gather(folder / name, {7: result(0), 8: answer, 9: result(2)})
        assert there == ["site-0000", "site-0002"], (name, there)
        assert grid.asked.count(8) == app.ATTEMPTS, name
        assert took < 30, name  # it is given up, and the deadline not waited for
        assert not list(folder.rglob("x"))
    there, grid, took = gather(folder / "late", {7: result(0), 8: None, 9: result(2)}, 0.5)
    assert there == ["site-0000", "site-0002"]
    assert took < 5
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
    # Nobody has two numbers.
    there, grid, _ = gather(folder / "two", {7: result(0)}, sites=1)
    (folder / "two" / "arrived" / "round-0001" / "site-0000").rename(folder / "two" / "away")
    there, grid, _ = gather(folder / "two", {7: result(1)}, sites=1)
    assert there == []
    print("all is well")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
