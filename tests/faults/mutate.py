"""Damage the files that the program reads, each in another way, and see what it does.

    PYTHONPATH=.:tests python tests/faults/mutate.py BASE RUN FOLDER COUNT SEED

BASE is a model, RUN a run directory with checkpoints; FOLDER takes the damaged copies. Prints a
line of JSON for each. A reader works in a fork, whose time and memory are measured.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 20
ACCEPTED, REFUSED, FAILED = 0, 2, 1

Mutation = Callable[[bytes, random.Random], bytes]


def main(base: str, run: str, folder: str, count: str, seed: str) -> None:
    draw = random.Random(int(seed))
    for name, path, reader in sources(Path(base), Path(run)):
        _, usual = observe(reader, prepare(path, Path(folder)), Path(folder))
        for i in range(int(count)):
            files = sorted(x for x in path.rglob("*") if is_read(x))
            victim = files[draw.randrange(len(files))].relative_to(path)
            kinds = BINARY if victim.suffix == ".safetensors" else TEXT
            kind = sorted(kinds)[i % len(kinds)]
            copy = prepare(path, Path(folder))
            data = kinds[kind]((copy / victim).read_bytes(), draw)
            (copy / victim).write_bytes(data)
            seen, _ = observe(reader, copy, Path(folder), usual["extra_bytes"])
            print(json.dumps({"source": name, "file": str(victim), "kind": kind, **seen}))


def sources(base: Path, run: Path) -> list[tuple[str, Path, Callable[[Path, Path], None]]]:
    """Return what is read: its name, where it is, and how it is read."""
    clients = run / "clients" / "round-0001"
    return [
        ("clients", clients, lambda copy, out: aggregate(base, copy, out)),
        ("base", base, lambda copy, out: aggregate(copy, clients, out)),
        ("checkpoint", run, lambda copy, out: newest(copy)),
    ]


def is_read(path: Path) -> bool:
    if "final" in path.parts:
        return False
    return path.suffix == ".safetensors" or path.name in (
        "adapter_config.json",
        "config.json",
        "manifest.json",
        "model.safetensors.index.json",
    )


def aggregate(base: Path, clients: Path, out: Path) -> None:
    from rich.console import Console

    from fedex_scale.aggregation.job import Job
    from fedex_scale.aggregation.offline import aggregate_files
    from fedex_scale.config.federation import AggregateSection, MethodConfig

    folders = tuple(sorted(clients.iterdir()))
    job = Job(
        base=str(base),
        out=out,
        clients=folders,
        weights=None,
        method=MethodConfig(),
        section=AggregateSection(fold="carry"),
        dtype=None,
        seed=0,
    )
    aggregate_files(job, Console(quiet=True))


def newest(run: Path) -> None:
    from fedex_scale.federation.saves import newest
    from fedex_scale.files.run_dir import RunDir
    from fedex_scale.runtime.errors import UserError

    found, problems, notes = newest(RunDir(run))
    if found is None or problems or notes:
        raise UserError(f"{problems} {notes}")


def prepare(path: Path, folder: Path) -> Path:
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    return copy


def observe(
    reader: Callable[[Path, Path], None], copy: Path, folder: Path, usual: int = 0
) -> tuple[dict, dict]:
    """Return what a reader did to a copy, and what it needed."""
    import fedex_scale.aggregation.offline
    import fedex_scale.run  # noqa: F401

    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    began, child = time.monotonic(), os.fork()
    if child == 0:
        os._exit(read(reader, copy, out))
    while (ended := os.wait4(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > LIMIT_S:
            os.kill(child, 9)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    extra = max(0, ended[2].ru_maxrss * 1024 - resident())
    left = [str(x) for x in folder.iterdir() if x.name not in ("copy", "out")]
    seen = {
        "outcome": {ACCEPTED: "accepted", REFUSED: "refused"}.get(code, f"failed ({code})"),
        "output_left": bool(left) or (out.exists() and code != ACCEPTED),
        "too_much_memory": extra > 2 * usual + 2**24,
    }
    return seen, {"extra_bytes": extra, "seconds": time.monotonic() - began}


def read(reader: Callable[[Path, Path], None], copy: Path, out: Path) -> int:
    from fedex_scale.runtime.errors import UserError

    try:
        reader(copy, out)
    except UserError as error:
        return REFUSED if "\n" not in str(error) else FAILED
    except BaseException:
        traceback.print_exc()
        return FAILED
    return ACCEPTED


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(min(len(data), 2000))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def random_bytes(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(1, 200))


def with_header(change: Callable[[dict, random.Random], object]) -> Mutation:
    """Return a mutation of a safetensors header, whose length stays right."""

    def mutate(data: bytes, draw: random.Random) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        text = change(header, draw)
        text = text if isinstance(text, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return mutate


def one_of(header: dict, draw: random.Random) -> dict:
    return header[draw.choice([name for name in header if name != "__metadata__"])]


def wrong_shape(header: dict, draw: random.Random) -> None:
    junk = [[2**62, 0], [-1, -4], [1.5, 2], ["4", 4], [[]], [True], None, [2**70], []]
    one_of(header, draw)["shape"] = draw.choice(junk)


def wrong_place(header: dict, draw: random.Random) -> None:
    junk = [[0, 2**60], [-8, 8], [0.0, 4.0], [0], "no", [0, 10**400], None]
    one_of(header, draw)["data_offsets"] = draw.choice(junk)


def wrong_dtype(header: dict, draw: random.Random) -> None:
    one_of(header, draw)["dtype"] = draw.choice(["F64", "I8", "Q4", None, ["F32"], {"a": 1}])


def wrong_name(header: dict, draw: random.Random) -> None:
    name = draw.choice([name for name in header if name != "__metadata__"])
    header[draw.choice(["../../etc/passwd", "", "lora_A", "a" * 10**5])] = header.pop(name)


def oversized(data: bytes, draw: random.Random) -> bytes:
    return struct.pack("<Q", draw.choice([2**63, 2**40, len(data), 2**24 + 1])) + data[8:]


def deep(data: bytes, draw: random.Random) -> bytes:
    return b"[" * draw.choice([1000, 100_000]) + b"]"


def with_value(data: bytes, draw: random.Random) -> bytes:
    """Replace one value of a JSON file by something else."""
    tree = json.loads(data)
    node = tree
    while True:
        key = draw.choice(sorted(node))
        if not (isinstance(node[key], dict) and node[key]):
            break
        node = node[key]
    junk = [None, -1, 0, 10**400, 1e308, "../../../etc/passwd", [], {}, True, "(a+)+$", [[]] * 9]
    node[key] = draw.choice(junk)
    return json.dumps(tree).encode()


def with_pattern(data: bytes, draw: random.Random) -> bytes:
    tree = json.loads(data)
    bad = ["(a|aa)+$", "(.*)*x", "[", "a" * 10_000, ".*.*.*.*.*.*.*!"]
    tree["rank_pattern"] = {draw.choice(bad): 4}
    return json.dumps(tree).encode()


BINARY: dict[str, Mutation] = {
    "truncated": truncated,
    "bit flipped": flipped,
    "random bytes": random_bytes,
    "wrong shape": with_header(wrong_shape),
    "wrong place": with_header(wrong_place),
    "wrong dtype": with_header(wrong_dtype),
    "wrong name": with_header(wrong_name),
    "deep header": with_header(lambda header, draw: deep(b"", draw)),
    "no header": with_header(lambda header, draw: draw.choice([b"[]", b"1", b"null", b'{"a": 1}'])),
    "oversized header": oversized,
}
TEXT: dict[str, Mutation] = {
    "truncated": truncated,
    "bit flipped": flipped,
    "random bytes": random_bytes,
    "deep JSON": deep,
    "other value": with_value,
    "hostile pattern": with_pattern,
    "other JSON": lambda data, draw: draw.choice([b"[]", b"1", b"null", b"{}", b"NaN"]),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
