"""Where a row stands in local files, and which line is broken: for errors, read again then."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, load_dataset

from fedex_scale.config.words import named, shown
from fedex_scale.runtime.errors import UserError

MAX_LINE_BYTES = 10_000_000
MAX_DEPTH = 500  # brackets within each other that are no reason to look closer
STEPS = np.zeros(256, dtype=np.int8)  # by byte: how much deeper what follows lies
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1


def place_of(files: Sequence[str], index: int) -> str:
    """Return where the row of this index, counted over all files, stands.

    A row of JSON lines has a line; of other files, and of a hub's dataset (no files), a number.
    """
    for file in files:
        if Path(file).suffix == ".jsonl":
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
    lines = _lines(file) if Path(file).suffix == ".jsonl" else [(0, Path(file).read_bytes())]
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
        if number and not isinstance(row, dict):
            raise UserError(
                f"{where}: expected a row with named columns, got {shown(row)}; correct it"
            )


def read_json(files: Sequence[str], source: str) -> Dataset:
    """Return the rows of JSON, or JSON lines, with its texts as they stand there.

    The reader of `datasets` takes a text that looks like a date for one, and writes it anew.

    Raises:
        UserError: the rows cannot be read, or are of several forms.
    """
    stats = [Path(file).stat() for file in files]
    # What is cached is known by these: a changed file is read anew.
    stamps = [
        (str(Path(file).resolve()), x.st_size, x.st_mtime_ns)
        for file, x in zip(files, stats, strict=True)
    ]
    known = {"files": list(files), "stamps": stamps}
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors come as exceptions, too
    try:
        rows = Dataset.from_generator(_like_rows_of, gen_kwargs=known)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data: cannot load {source} ({why}); look at the file") from None
    if not len(rows):
        raise UserError(f"{source}: expected at least one row, got none; name other data")
    return rows


def _like_rows_of(files: Sequence[str], stamps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows while each has the columns of the first, and their types.

    Those of the first thousand rows are the table's: later others would be left out, or rewritten.
    """
    types: dict[str, type] | None = None
    for row in _rows_of(files, stamps):
        if types is None:
            types = dict.fromkeys(row, type(None))
        if row.keys() != types.keys():
            raise ValueError("rows of several columns")
        for key, value in row.items():
            if value is not None and types.setdefault(key, type(value)) is not type(value):
                if types[key] is not type(None):
                    raise ValueError("a column of several types")
                types[key] = type(value)
        yield row


def _rows_of(files: Sequence[str], stamps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    for file in files:
        if Path(file).suffix == ".json":
            try:
                whole = json.loads(Path(file).read_bytes())
                yield from whole if isinstance(whole, list) else [whole]
                continue
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Extra data"):
                    raise
        yield from (json.loads(raw) for _, raw in _lines(file))


def read_lines(files: Sequence[str]) -> Dataset:
    """Return the rows of JSON that `blame` found nothing wrong with, one after another.

    For rows of which some have keys that others lack, within a turn too: `datasets` may refuse
    them, as it decides on the first ones.

    Raises:
        UserError: a column holds values of several types, or what is half a character.
    """
    rows = list(_rows_of(files, ()))
    if not rows:
        raise UserError(f"{named(files[0])}: expected at least one row, got none; name other data")
    for index, row in enumerate(rows):
        _check_row(row, files, index)
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [_flat(row.get(key), key) for row in rows] for key in keys}
    for name, values in columns.items():
        first = next((value for value in values if value is not None), None)
        try:
            pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            odd = next(i for i, value in enumerate(values) if not _go_together(first, value))
            raise UserError(
                f"{place_of(files, odd)}: expected {named(name)} to be as in the rows before it "
                f"({shown(first)}), got {shown(values[odd])}; bring all rows to one form"
            ) from None
    return Dataset.from_dict(columns)


def csv_as_text(file: str) -> dict[str, Any]:
    """Return how `datasets` reads CSV so that a cell is what stands there, and an empty one null.

    A type that is guessed for a column would write its cells anew, `01234` as `1234`.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            columns = next(filter(None, csv.reader(lines)), [])
    except csv.Error:
        return {}  # the reader says what is wrong
    texts = Features({column: Value("string") for column in columns})
    return {"features": texts, "keep_default_na": False, "na_values": [""]}


def _check_row(row: Any, files: Sequence[str], index: int) -> None:
    if not isinstance(row, dict):
        raise UserError(
            f"{place_of(files, index)}: expected a row with named columns, got {shown(row)}; "
            "correct it"
        )
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{place_of(files, index)}: expected characters, got half of one ({half}); correct it"
        ) from None


def _flat(value: Any, column: str) -> Any:
    """Return turns whose content is a list of texts with the texts joined.

    Tools and calls, of which each has other keys, become text, as a column has one type.
    """
    if not isinstance(value, list):
        return value
    if column == "tools":
        return json.dumps(value)
    return [_flat_turn(turn) if isinstance(turn, dict) else turn for turn in value]


def _flat_turn(turn: dict[str, Any]) -> dict[str, Any]:
    flat = dict(turn)
    if "content" in turn:
        flat["content"] = text_of(turn["content"])
    if isinstance(turn.get("tool_calls"), list):
        flat["tool_calls"] = json.dumps(turn["tool_calls"])
    return flat


def text_of(content: Any) -> Any:
    """Return a turn's content as text, where it is a list of parts that are all text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _go_together(one: Any, other: Any) -> bool:
    try:
        pa.array([one, other])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that hold something, with their numbers."""
    with Path(file).open("rb") as lines:
        yield from ((i, line) for i, line in enumerate(lines, start=1) if line.strip())


def _numbers_of_rows(file: str) -> list[int]:
    return [number for number, _ in _lines(file)]
