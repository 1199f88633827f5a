"""Files in pieces: what of which file goes into a message, read from disk and written to it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

SENT = frozenset(
    "server.json adapter/adapter_config.json adapter/adapter_model.safetensors "
    "side/adapter_config.json side/adapter_model.safetensors".split()
)
RETURNED = frozenset("client.json adapter_config.json adapter_model.safetensors".split())
Part = Mapping[str, tuple[int, int]]
"""What goes into a message: where in which file it begins, and its bytes."""


def sizes_of(folder: Path, names: frozenset[str]) -> dict[str, int]:
    """Return the sizes of a directory's files."""
    return {x: (folder / x).stat().st_size for x in sorted(names) if (folder / x).is_file()}


def cut(sizes: Mapping[str, int], most: int) -> Iterator[Part]:
    """Yield what goes into each message: at most so many bytes, of one file or of several."""
    part, room = {}, most
    for name, size in sizes.items():
        offset = 0
        while offset < size:
            length = min(size - offset, room)
            part[name] = (offset, length)
            offset, room = offset + length, room - length
            if not room:
                yield part
                part, room = {}, most
    if part:
        yield part


def read_part(folder: Path, part: Part) -> RecordDict:
    """Return pieces of a directory's files, a blob each."""
    blobs = {}
    for name, (offset, length) in part.items():
        with (folder / name).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        blobs[name] = Array(dtype="uint8", shape=(len(data),), stype="file", data=data)
    return RecordDict({"blobs": ArrayRecord(blobs)})


def write_part(content: RecordDict, part: Part, folder: Path) -> None:
    """Write pieces of files where they belong.

    Raises:
        ValueError: the message holds other pieces than these.
    """
    blobs = content["blobs"]
    if not isinstance(blobs, ArrayRecord) or set(blobs) != set(part):
        raise ValueError(f"expected pieces of {sorted(part)}")
    for name, (offset, length) in part.items():
        path, data = folder / name, blobs[name].data
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(data) != length:
            raise ValueError(f"expected {length} bytes of {name}, got {len(data)}")
        path.touch()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)


def record_of(part: Part) -> ConfigRecord:
    return ConfigRecord({name: list(place) for name, place in part.items()})


def part_of(content: RecordDict, names: frozenset[str]) -> Part:
    """Return which pieces a message is about.

    Raises:
        ValueError: of a file that is none of those.
    """
    part = {name: (int(place[0]), int(place[1])) for name, place in content["part"].items()}
    if not set(part) <= names:
        raise ValueError(f"expected pieces of {sorted(names)}")
    return part
