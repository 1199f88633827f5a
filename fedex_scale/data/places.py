"""Where a row stands in local files, and which line is broken: for errors, read again then."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import load_dataset

from fedex_scale.config.words import named, shown
from fedex_scale.runtime.errors import UserError

MAX_LINE_BYTES = 10_000_000
MAX_DEPTH = 500  # brackets within each other that are no reason to look closer
STEPS = np.zeros(256, dtype=np.int8)  # by byte: how much deeper what follows lies
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


def place_of(files: Sequence[str], index: int) -> str:
    """Return where the row of this index, counted over all files, stands.

    A row of JSON lines or CSV has a line; of others, and of a hub's dataset (no files), a number.
    """
    for file in files:
        if Path(file).suffix in (".jsonl", ".csv"):
            lines = _numbers_of_rows(file)
            if index < len(lines):
                return f"{named(file)}: line {lines[index]}"
            index -= len(lines)
        elif len(files) > 1:
            kind = Path(file).suffix[1:]
            rows = len(load_dataset(kind, data_files=[file], split="train"))
            if index < rows:
                return f"{named(file)}: row {index + 1}"
            index -= rows
    return f"{named(files[-1])}: row {index + 1}" if files else f"row {index + 1}"


def check_file(file: str) -> None:
    """Raise a UserError for what would take down, or hold up, who reads a file of JSON or CSV.

    That is text that is not UTF-8, a line of JSON lines that is too long to be one row, and lists
    within lists without end, on which a parser may crash.
    """
    by_line, depth = Path(file).suffix == ".jsonl", 0
    with Path(file).open("rb") as lines:
        number, held = 1, b""
        while piece := lines.readline(MAX_LINE_BYTES + 1):
            if by_line and len(piece) > MAX_LINE_BYTES:
                raise UserError(
                    f"{named(file)}: line {number}: expected at most {MAX_LINE_BYTES:,} bytes, a "
                    "row a line, got more; split the row, or look whether its lines were joined"
                )
            held = _check_utf8(held + piece, f"{named(file)}: line {number}")
            deepest, depth = _depths(piece, 0 if by_line else depth)
            if deepest > MAX_DEPTH:
                _check_depth(piece if by_line else Path(file).read_bytes(), file, number)
                depth = -(2**62)  # the whole file is known to be sound, if it is not by line
            number += piece.endswith(b"\n")
        _check_utf8(held + b"\n" * bool(held), f"{named(file)}: line {number}")


def _depths(piece: bytes, depth: int) -> tuple[int, int]:
    """Return how deep lists lie within each other at most, and at the end.

    Brackets within texts count too, so that this is for knowing where to look closer.
    """
    opened = piece.count(b"[") + piece.count(b"{")
    end = depth + opened - piece.count(b"]") - piece.count(b"}")
    if depth + opened <= MAX_DEPTH:
        return depth + opened, end
    steps = STEPS[np.frombuffer(piece, dtype=np.uint8)]
    return depth + int(np.cumsum(steps, dtype=np.int32).max()), end


def _check_utf8(raw: bytes, where: str) -> bytes:
    """Return the end of a piece that is the begin of a character, as the piece was cut there."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not raw.endswith(b"\n"):
            return raw[error.start :]
        raise UserError(
            f"{where}: expected UTF-8, got the byte {raw[error.start]:#04x}; save it as UTF-8 "
            "(iconv -f latin1 -t utf8)"
        ) from None
    return b""


def _check_depth(raw: bytes, file: str, number: int) -> None:
    try:
        json.loads(raw)
    except RecursionError:
        raise UserError(
            f"{named(file)}: line {number}: nested too deep; expected a row of texts"
        ) from None
    except ValueError:
        return  # `blame` says where


def blame(file: str) -> None:
    """Raise a UserError for the first line that is not JSON, in a file that `check_file` passed."""
    lines = lines_of(file) if Path(file).suffix == ".jsonl" else [(0, Path(file).read_bytes())]
    for number, raw in lines:
        where = f"{named(file)}: line {number}" if number else named(file)
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            line = number or error.lineno
            raise UserError(
                f"{named(file)}: line {line}: not valid JSON ({error.msg}, column {error.colno}); "
                "correct it"
            ) from None
        except ValueError:  # what Python says of a number that has more
            raise UserError(
                f"{where}: expected numbers of at most 4,300 digits, got more; correct it"
            ) from None
        if number and not isinstance(row, dict):
            raise UserError(
                f"{where}: expected a row with named columns, got {shown(row)}; correct it"
            )


def lines_of(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that hold something, with their numbers."""
    with Path(file).open("rb") as lines:
        yield from ((i, line) for i, line in enumerate(lines, start=1) if line.strip())


def csv_rows(file: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of CSV that hold something, the header first, with the line each ends on.

    Raises:
        UserError: it is not CSV.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with Path(file).open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            yield from ((reader.line_num, cells) for cells in reader if cells)
        except csv.Error as error:
            raise UserError(
                f"{named(file)}: line {reader.line_num}: not valid CSV ({error}); correct it"
            ) from None


def _numbers_of_rows(file: str) -> list[int]:
    if Path(file).suffix == ".csv":
        return [number for number, _ in csv_rows(file)][1:]
    return [number for number, _ in lines_of(file)]
