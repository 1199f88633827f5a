"""The one door for files that others can have written: what is checked is what is read.

Nothing else in the package opens such a file (`tests/unit/test_door.py` looks at the source).
Opening tells a file that is not there by OSError, as ever, so that the caller can say what it is
for; all that a stranger could mean to do is a UserError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedex_scale.runtime.errors import UserError

MAX_JSON_BYTES = 2**26
MAX_LINE_BYTES = 2**22
MAX_DEPTH = 40
MANY = 10_000  # lists and objects, from which on they are to hold something: each takes memory
MAX_DIGITS = 20  # of a whole number; more are no count, size or seed
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def opened(path: str | Path, *, inside: Path | None = None) -> Iterator[BinaryIO]:
    """Give a regular file to read, unbuffered; it is never waited for, as a pipe would be.

    Args:
        inside: the directory that it has to lie in, wherever links lead to; but for those into
            the blobs of a hub's cache, which its snapshots are made of.

    Raises:
        OSError: it is not there, or may not be read.
        UserError: it is something else than a file, or lies elsewhere.
    """
    # A handle on the place alone touches no device; what it names is looked at, then read.
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind != stat.S_IFREG:
            found = _KINDS.get(kind, "something else")
            raise UserError(f"{path}: expected a regular file, got {found}; put the file there")
        place = f"/proc/self/fd/{handle}"
        if inside is not None:
            _check_inside(Path(path), os.readlink(place), inside)
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(handle)
    with open(descriptor, "rb", buffering=0) as file:
        yield file


def read_bytes(
    path: str | Path, *, most: int = MAX_JSON_BYTES, inside: Path | None = None
) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: it is not there, or may not be read.
        UserError: it is not a regular file, lies elsewhere, or is larger than `most`.
    """
    with opened(path, inside=inside) as file:
        data = bytearray()
        if os.fstat(file.fileno()).st_size <= most:
            while len(data) <= most and (block := file.read(most + 1 - len(data))):
                data += block
            if len(data) <= most:
                return bytes(data)
    raise UserError(f"{path}: expected at most {most:,} bytes, got more; is it the right file?")


def read_json(
    path: str | Path,
    remedy: str,
    *,
    most: int = MAX_JSON_BYTES,
    inside: Path | None = None,
    finite: bool = True,
) -> Any:
    """Return what a JSON file holds; see `parse_json`.

    Args:
        remedy: what to do about a file that cannot be read.

    Raises:
        OSError: it is not there, or may not be read.
        UserError: it is not plain JSON, or no file that could be.
    """
    data = read_bytes(path, most=most, inside=inside)
    try:
        return parse_json(data, finite=finite)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def check_directory(path: Path) -> None:
    """Raise a UserError where a library that is to read a directory would wait, or never end.

    For model directories, which transformers opens by itself.
    """
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.is_dir() or not entry.exists():
            continue
        with opened(entry) as file:
            size = os.fstat(file.fileno()).st_size
        if entry.suffix == ".json" and size > MAX_JSON_BYTES:
            raise UserError(
                f"{entry}: expected at most {MAX_JSON_BYTES:,} bytes, got {size:,}; fetch it again"
            )


def copy_file(path: Path, to: Path, *, inside: Path) -> int:
    """Copy a file to a new one, and return its size.

    Raises:
        OSError, UserError: as `opened` does.
    """
    size = 0
    with opened(path, inside=inside) as source, to.open("xb", buffering=0) as target:
        end = os.fstat(source.fileno()).st_size  # and no more, should it grow
        while size < end:
            count = os.sendfile(target.fileno(), source.fileno(), size, min(end - size, 2**30))
            if not count:
                break
            size += count
    return size


def read_lines(path: str | Path, *, inside: Path | None = None) -> Iterator[bytes]:
    """Yield the lines of a file of any length, each bounded.

    Raises:
        OSError, UserError: as `read_bytes` does.
    """
    with opened(path, inside=inside) as file:
        rest = b""
        while block := file.read(2**20):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
            if len(rest) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}: expected lines of at most {MAX_LINE_BYTES:,} bytes, got a longer one"
                )
        if rest:
            yield rest


def digest(path: str | Path, *, inside: Path | None = None) -> tuple[int, str]:
    """Return a file's size and SHA-256.

    Raises:
        OSError, UserError: as `opened` does.
    """
    found, size, block = hashlib.sha256(), 0, bytearray(2**22)
    with opened(path, inside=inside) as file:
        while count := file.readinto(block):
            found.update(memoryview(block)[:count])
            size += count
    return size, found.hexdigest()


def parse_json(data: bytes | str, *, finite: bool = True) -> Any:
    """Return what JSON holds: no key twice, no number beyond a double, no depth and no width that
    hurts.

    Args:
        finite: refuse NaN and Infinity, which are no JSON; otherwise they come as floats.

    Raises:
        ValueError: it is not that.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    groups = text.count("[") + text.count("{")
    if groups > MANY and groups > len(text) / 8:
        raise ValueError(f"{groups:,} lists and objects in {len(text):,} characters")
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant if finite else float,
        )
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} values within each other") from None
    if groups > MAX_DEPTH or _SURROGATE.search(text):
        _check_tree(tree)
    return tree


def _check_inside(path: Path, real: str, inside: Path) -> None:
    """Raise a UserError where an open file lies elsewhere than its path says."""
    allowed = os.path.realpath(inside)
    *_, model, folder = ("", "", *Path(real).parts[:-1])
    if folder == "blobs" and model.startswith("models--"):
        return
    if not real.startswith(allowed.rstrip("/") + "/"):
        raise UserError(
            f"{path}: expected a file in {inside}, got a link to {real}; put the file itself there"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r:.80} is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is beyond the range of numbers")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def _check_tree(tree: Any) -> None:
    """Raise a ValueError for too much depth, or text that no file can hold; without recursion."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} values within each other")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node.keys()
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and any("\ud800" <= x <= "\udfff" for x in node):
                raise ValueError(f"text with half a character: {node!a:.80}")
        level = below
