"""What is done to a file that a command is going to read, as hypothesis draws it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

JUNK = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, -1e308, 1e-308, 0.5),
    *("", "x", "\x1b[2J\x1b[31m", "[/]", "[bold]", "\u202e", "\ud800", "a\nb", "../../etc/passwd"),
    *("(a|aa)+$", "(.*)*x", "(?i)q", "[", "n" * 100_000, "/dev/zero", "nan", "${jndi}", "$x^"),
    *([], {}, [[]], [1], ["q_proj"], {"a": 1}, {"": None}, [None] * 1000, list("abc") * 5000),
]
NO_OBJECTS = (b"[]", b"1", b"null", b"{}", b"NaN", b"")
NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999")
values = st.one_of(
    st.sampled_from(JUNK).map(deepcopy),  # a second change may go within the first
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.recursive(st.none() | st.integers(), lambda x: st.lists(x, max_size=3), max_leaves=20),
)

READ = {  # which files a command reads
    "config": ("config.yaml",),
    "compare": ("samples.jsonl",),
    "evaluate": ("config.yaml", "adapter_config.json", "aggregate.json"),
}


def damage(name: str, copy: Path, data: st.DataObject) -> dict[str, str]:
    """Change one file of a copy, or several of a kind."""
    files = sorted(x for x in copy.rglob("*") if x.is_file() and "README" not in x.name)
    files = [x for x in files if x.name in READ.get(name, (x.name,))]
    victim = data.draw(st.sampled_from(files))
    kinds: dict[str, Callable[[Path, st.DataObject], None]] = dict(PLACES)
    if victim.suffix == ".safetensors":
        kinds |= TENSORS
    elif victim.suffix == ".json":
        kinds |= TREES
    elif victim.suffix == ".jsonl":
        kinds |= LINES
    elif victim.suffix == ".yaml":
        kinds |= YAMLS
    # What is inside of a file is drawn more often than what it is.
    inside = [kind for kind in kinds if kind not in PLACES]
    kind = data.draw(st.sampled_from(sorted([*kinds, *3 * inside])))
    kinds[kind](victim, data)
    return {"file": str(victim.relative_to(copy)), "kind": kind}


def on_bytes(change: Callable[[bytes, st.DataObject], bytes]) -> Callable:
    def mutate(path: Path, data: st.DataObject) -> None:
        path.write_bytes(change(path.read_bytes(), data))

    return mutate


def cut(text: bytes, data: st.DataObject) -> bytes:
    return text[: data.draw(st.integers(0, max(0, len(text) - 1)))]


def zeroed(text: bytes, data: st.DataObject) -> bytes:
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    size = data.draw(st.sampled_from([1, 16, 512, 2**20]))
    return text[:start] + bytes(len(text[start : start + size])) + text[start + size :]


def flipped(text: bytes, data: st.DataObject) -> bytes:
    changed = bytearray(text or b"x")
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(len(changed), 3000) - 1))] ^= 1 << data.draw(
            st.integers(0, 7)
        )
    return bytes(changed)


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


PLACES: dict[str, Callable] = {
    "gone": lambda path, data: path.unlink(),
    "a pipe": lambda path, data: replaced(path, os.mkfifo),
    "endless": lambda path, data: replaced(path, lambda x: x.symlink_to("/dev/zero")),
    "a link out": lambda path, data: replaced(path, lambda x: x.symlink_to("/etc/passwd")),
    "a link to itself": lambda path, data: replaced(path, lambda x: x.symlink_to(x.name)),
    "a directory": lambda path, data: replaced(path, Path.mkdir),
    "sparse": lambda path, data: os.truncate(path, 2**31),
    "cut": on_bytes(cut),
    "zeroed": on_bytes(zeroed),
    "flipped": on_bytes(flipped),
    "other bytes": on_bytes(lambda text, data: data.draw(st.binary(max_size=100))),
    "other JSON": on_bytes(lambda text, data: data.draw(st.sampled_from(NO_OBJECTS))),
}


def nodes(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the places in a tree, as paths of keys; of long lists, the first few."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))


def with_node(tree: Any, data: st.DataObject, value: Any) -> Any:
    """Put something else at a place of a tree, or take it away, or another name for it."""
    places = list(nodes(tree)) if isinstance(tree, dict | list) else []
    if not places:
        return value
    path = data.draw(st.sampled_from(places))
    node = tree
    for key in path[:-1]:
        node = node[key]
    action = data.draw(st.sampled_from(["set"] * 6 + ["delete", "rename"]))
    if action == "delete":
        del node[path[-1]]
    elif action == "rename" and isinstance(node, dict):
        node[str(data.draw(st.sampled_from(JUNK)))] = node.pop(path[-1])
    else:
        node[path[-1]] = value
    return tree


def dumped(tree: Any) -> bytes:
    """Return JSON, with half characters as they are escaped."""
    return json.dumps(tree).encode()


def other_node(text: bytes, data: st.DataObject) -> bytes:
    tree = json.loads(text)
    for _ in range(data.draw(st.integers(1, 2))):
        tree = with_node(tree, data, data.draw(values))
    return dumped(tree)


def other_number(text: bytes, data: st.DataObject) -> bytes:
    marked = dumped(with_node(json.loads(text), data, "@@"))
    return marked.replace(b'"@@"', data.draw(st.sampled_from(NUMBERS)).encode())


def twice(text: bytes, data: st.DataObject) -> bytes:
    tree = json.loads(text)
    if not isinstance(tree, dict) or not tree:
        return text
    key = data.draw(st.sampled_from(sorted(tree)))
    more = f"{json.dumps(key)}: {json.dumps(data.draw(st.sampled_from(JUNK)))}"
    return text.rstrip()[:-1] + f", {more}}}".encode()


def deep(text: bytes, data: st.DataObject) -> bytes:
    count = data.draw(st.sampled_from([100, 900, 100_000]))
    left, right = data.draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    nested = left * count + "1" + right * count
    marked = dumped(with_node(json.loads(text), data, "@@"))
    return marked.replace(b'"@@"', nested.encode())


def other_pattern(text: bytes, data: st.DataObject) -> bytes:
    tree, key = json.loads(text), data.draw(st.sampled_from(["rank_pattern", "target_modules"]))
    bad = data.draw(st.sampled_from(["(a|aa)+$", "(.*)*x", "[", "a" * 10_000, ".*.*.*.*.*.*.*!"]))
    return dumped(tree | {key: {bad: 4} if key == "rank_pattern" else bad})


TREES: dict[str, Callable] = {
    "other pattern": on_bytes(other_pattern),
    "other value": on_bytes(other_node),
    "no number": on_bytes(other_number),
    "twice": on_bytes(twice),
    "deep": on_bytes(deep),
}


def in_line(change: Callable[[bytes, st.DataObject], bytes]) -> Callable:
    def mutate(path: Path, data: st.DataObject) -> None:
        lines = path.read_bytes().splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        lines[place] = change(lines[place], data)
        path.write_bytes(b"\n".join(lines) + b"\n")

    return mutate


def long_line(text: bytes, data: st.DataObject) -> bytes:
    return dumped(json.loads(text) | {"more": "x" * 50_000_000})


LINES: dict[str, Callable] = {
    "other value in a line": in_line(other_node),
    "no number in a line": in_line(other_number),
    "a line deep": in_line(deep),
    "a long line": in_line(long_line),
}


def other_yaml(text: bytes, data: st.DataObject) -> bytes:
    import yaml

    tree = yaml.safe_load(text)
    for _ in range(data.draw(st.integers(1, 2))):
        tree = with_node(tree, data, data.draw(values))
    return json.dumps(tree).encode()


def aliases(text: bytes, data: st.DataObject) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return text + "\n".join(lines).encode()


YAMLS: dict[str, Callable] = {
    "other value": on_bytes(other_yaml),
    "aliases": on_bytes(aliases),
    "deep": on_bytes(lambda text, data: b"run: " + b"[" * 900 + b"]" * 900),
    "code": on_bytes(lambda text, data: text + b"\nx: !!python/object/apply:os.system [id]\n"),
    "trusting": on_bytes(lambda text, data: text.replace(b"code: false", b"code: true")),
}


def in_header(change: Callable[[dict, st.DataObject], bytes | None]) -> Callable:
    def mutate(path: Path, data: st.DataObject) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        text = change(header, data)
        text = dumped(header) if text is None else text
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return mutate


def one_of(header: dict, data: st.DataObject) -> str:
    names = sorted(name for name in header if name != "__metadata__")
    return data.draw(st.sampled_from(names)) if names else ""


def other_entry(header: dict, data: st.DataObject) -> None:
    if not (name := one_of(header, data)):
        return
    key = data.draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
    shape = header[name]["shape"]
    choices = {
        "shape": [[2**62, 0], [0], [], [1, *shape], shape[::-1], [-1, -1], [1.5], [True]],
        "dtype": ["F64", "F16", "BF16", "I8", "I32", "I64", "BOOL", "F8_E4M3", "Q4", None, ["F32"]],
        "data_offsets": [[0, 0], [0, 2**60], [-8, 8], [0.0, 4.0], [0], "no", None],
    }
    junk = st.sampled_from(choices[key]) | values
    header[name][key] = data.draw(junk)


def other_name(header: dict, data: st.DataObject) -> None:
    if name := one_of(header, data):
        new = data.draw(
            st.sampled_from(
                ["", "lora_A", "n" * 10**6, "\x1b[2J", "../../x", name.replace("lora_A", "lora_B")]
            )
        )
        header[new] = header.pop(name)


def lone(header: dict, data: st.DataObject) -> None:
    if name := one_of(header, data):
        del header[name]


def crowd(header: dict, data: st.DataObject) -> bytes:
    kind = data.draw(st.sampled_from(["empty", "nothing", "many"]))
    if kind == "empty":
        return b"{" + b",".join(b'"%d":{}' % i for i in range(10**6)) + b"}"
    if kind == "nothing":
        entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        return b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(150_000)) + b"}"
    return b"[" + b"0," * 5_000_000 + b"0]"


def other_length(text: bytes, data: st.DataObject) -> bytes:
    length = data.draw(st.sampled_from([2**63, 2**40, len(text), 2**24 + 1, 0, 1]))
    return struct.pack("<Q", length) + text[8:]


def twin(header: dict, data: st.DataObject) -> bytes | None:
    if not (name := one_of(header, data)):
        return None
    entry = dict(header[name], shape=[1, 1])
    return dumped(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()


def numbers(path: Path, data: st.DataObject) -> None:
    """Put numbers into the tensors that are none, or beyond what sums hold."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    bad = data.draw(
        st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e30, 1e-45])
    )
    word, body = struct.pack("<f", bad), len(content) - 8 - length
    if data.draw(st.booleans()):
        content[8 + length :] = word * (body // 4) + bytes(body % 4)
    elif body >= 4:
        place = 8 + length + 4 * data.draw(st.integers(0, body // 4 - 1))
        content[place : place + 4] = word
    path.write_bytes(content)


TENSORS: dict[str, Callable] = {
    "other entry": in_header(other_entry),
    "other name": in_header(other_name),
    "lone": in_header(lone),
    "crowd": in_header(crowd),
    "twin": in_header(twin),
    "numbers": numbers,
    "other length": on_bytes(other_length),
    "no header": in_header(lambda header, data: data.draw(st.sampled_from(NO_OBJECTS))),
}
