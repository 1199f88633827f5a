"""Safetensors files, read and written a tensor or a block at a time, in any order.

Plain reads and writes: the library maps whole files, whose touched pages count as this process's
memory, and its `save_file` wants every tensor at once.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
BLOCK_BYTES = 2**23
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FORMAT = {"format": "pt"}  # as PyTorch's own
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 64  # as torch has them
MAX_NAME = 1000
_MAX_HEADER_BYTES = 2**24


class Entry(NamedTuple):
    """One tensor of a file; it lies in bytes `start` to `end`, counted from the file's begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """A safetensors file of which just the header is read at first; never left open.

    Args:
        most_tensors: more of them are refused before their names are read.

    Raises:
        OSError: it is not there, or may not be read.
        UserError: the file is damaged: cut short, or its header contradicts itself.
    """

    def __init__(self, path: Path, *, most_tensors: int = MAX_TENSORS) -> None:
        self.path = path
        try:
            with door.opened(path, inside=path.parent) as file:
                self._identity = _identity(file)
                self.metadata, self.entries = _read_header(file, most_tensors)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: damaged ({str(error)[:200]}); fetch or send the file again"
            ) from None

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Return one whole tensor; in the memory of `out`, bytes on the CPU, if given."""
        entry = self.entries[name]
        return self._read(entry, entry.start, entry.end, out).view(entry.shape)

    def blocks(
        self, name: str, span: tuple[int, int] | None = None, buffer: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield a tensor as flat parts of some 8 MB, one after another in one place.

        Args:
            span: the elements to read, from one to before the other; None: all.
            buffer: bytes on the CPU to read into, as many at a time.
        """
        entry = self.entries[name]
        size = entry.dtype.itemsize
        begin, end = entry.start, entry.end
        if span is not None:
            begin, end = (entry.start + size * place for place in span)
        if buffer is None:
            buffer = torch.empty(min(BLOCK_BYTES, end - begin), dtype=torch.uint8)
        step = max(1, buffer.numel() // size * size)
        for start in range(begin, end, step):
            yield self._read(entry, start, min(start + step, end), buffer)

    def _read(self, entry: Entry, start: int, end: int, out: Tensor | None) -> Tensor:
        data = torch.empty(end - start, dtype=torch.uint8) if out is None else out[: end - start]
        left = memoryview(data.numpy())
        with door.opened(self.path, inside=self.path.parent) as file:
            if _identity(file) != self._identity:
                raise UserError(f"{self.path}: was changed while it was read; begin again")
            file.seek(start)
            while left:
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{self.path}: damaged (cut short); fetch or send it again")
                left = left[count:]
        return data.view(entry.dtype)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order.

    The header needs names, dtypes and shapes only, so the offsets are known beforehand.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        metadata = _FORMAT if metadata is None else metadata
        header, self._offsets, end = _header(specs, metadata)
        self._specs = dict(specs)
        self._file = path.open("wb", buffering=0)
        _write_all(self._file, memoryview(header))
        self._start = self._file.tell()
        self._file.truncate(self._start + end)
        self._missing = set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        shape = self._specs[name][1]
        assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
        self.write_blocks(name, [tensor])

    def write_blocks(self, name: str, blocks: Iterator[Tensor] | list[Tensor]) -> None:
        """Write a tensor that comes as parts, one after another; each is converted to its dtype."""
        dtype = self._specs[name][0]
        self._file.seek(self._start + self._offsets[name])
        for block in blocks:
            _write_all(self._file, _bytes(block, dtype))
        self._missing.discard(name)

    def write_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Write all tensors of the file, with few calls: a thread that writes disturbs no other."""
        self._file.seek(self._start)
        _write_all(
            self._file,
            *(_bytes(tensors[name], dtype) for name, (dtype, _) in self._specs.items()),
        )
        self._missing.clear()

    @property
    def missing(self) -> set[str]:
        """Names of the tensors that are still to be written."""
        return set(self._missing)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._file.close()
        assert error or not self._missing, f"never written: {sorted(self._missing)[:3]}"


_WIDEST = 10**7 - 1
"""No side of a tensor is longer."""


class TrimmedWriter:
    """Writes tensors that may turn out smaller than announced, one after another.

    Room for the header is kept at the beginning; it is written when all tensors are there. It does
    not depend on what was announced, so that files of one content are alike.

    Args:
        largest: dtype and the most that a tensor's shape can be, by name.
    """

    def __init__(self, path: Path, largest: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        widest = {
            name: (dtype, (_WIDEST,) * len(shape)) for name, (dtype, shape) in largest.items()
        }
        self._specs, self._room = dict(largest), len(_header(widest, _FORMAT)[0])
        self._written: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._file = path.open("wb", buffering=0)
        self._file.seek(self._room)

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, most = self._specs[name]
        shape = tuple(tensor.shape)
        assert all(size <= bound for size, bound in zip(shape, most, strict=True)), (name, shape)
        self._written[name] = (dtype, shape)
        _write_all(self._file, _bytes(tensor, dtype))

    def __enter__(self) -> TrimmedWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if not error:
            assert self._written.keys() == self._specs.keys(), "a tensor was never written"
            self._file.seek(0)
            header = _header(self._written, _FORMAT, room=self._room)[0]
            assert len(header) == self._room, "written in another order than announced"
            _write_all(self._file, memoryview(header))
        self._file.close()


def _header(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    *,
    room: int = 0,
) -> tuple[bytes, dict[str, int], int]:
    """Return a file's beginning, filled up to `room`, tensors' offsets after it, and their end."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets, end = {}, 0
    for name, (dtype, shape) in specs.items():
        size = dtype.itemsize * math.prod(shape)
        offsets[name] = end
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    return struct.pack("<Q", len(text)) + text, offsets, end


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _write_all(file, *data: memoryview) -> None:
    """Write everything; a raw file may take a part, and at most 2 GB at once."""
    left = [part for part in data if part]
    while left:
        count = os.writev(file.fileno(), left[: os.sysconf("SC_IOV_MAX")])
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """Return what tells a file from another, or from itself once it was changed."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_header(file: BinaryIO, most: int) -> tuple[dict[str, str], dict[str, Entry]]:
    size = os.fstat(file.fileno()).st_size
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError("no header, or cut short")
    text = file.read(length)
    # An object that names no place is none of a tensor's; both are counted before any is made.
    count = text.count(b'"data_offsets"')
    too_long = length > 2**20 + 1000 * count
    if count > most or too_long or text.count(b"{") > count + 2 + MAX_TENSORS // 100:
        raise ValueError(f"expected at most {most:,} tensors, got more")
    header = door.parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", None) or {}
    texts = metadata.values() if isinstance(metadata, dict) else [metadata]
    if not all(isinstance(value, str) for value in texts):
        raise ValueError("its metadata are no text")
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    last = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != last:
            raise ValueError("tensors overlap, or leave gaps")
        last = entry.end
    if last != size:
        raise ValueError(f"expected {last} bytes, got {size}: cut short?")
    return metadata, entries


def _entry(name: str, value: dict, begin: int) -> Entry:
    """Return where a tensor lies, if what the header says of it agrees with itself."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"{name!r:.80} is no name of at most {MAX_NAME} characters")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {value['dtype']}")
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape):,} dimensions")
    start, end = value["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 2**48 for number in (*shape, start, end)):
        raise ValueError(f"{name} has a shape or a place that is no number of bytes")
    if end - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{name} has a shape that does not fit its place")
    return Entry(dtype, shape, begin + start, begin + end)
