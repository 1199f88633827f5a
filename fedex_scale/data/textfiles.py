"""Rows of JSON, JSON lines and CSV, with their texts as they stand there."""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from fedex_scale.config.words import named, shown
from fedex_scale.data.places import blame, csv_rows, lines_of, place_of
from fedex_scale.runtime.errors import UserError

MAX_DEPTH = 50  # of lists and objects within each other, beyond which Arrow gives up
MAX_INTEGER = 2**63  # below which a whole number has to be, as a column's are of 64 bits
SEEN = 1000  # rows from which `datasets` decides on a table's columns and their types
FORM = 1  # of what is cached: goes up where the same file is read otherwise than before


def read_texts(files: Sequence[str]) -> Dataset:
    """Return the rows of files of one kind, one after another, with their texts as they stand.

    The readers of `datasets` take a text that looks like a date, or a number in CSV, for one, and
    write it anew; what comes late, or is of another type, they leave out or rewrite. So the rows
    are handed to it while they are alike, and read whole into memory where they are not.

    Raises:
        UserError: a row that cannot be read, with its line; no rows.
    """
    stats = [Path(file).stat() for file in files]
    # What is cached is known by these: a changed file is read anew. In tuples, as each element of
    # a list would be a table of its own.
    stamps = tuple(
        (str(Path(file).resolve()), x.st_ino, x.st_size, x.st_mtime_ns, x.st_ctime_ns)
        for file, x in zip(files, stats, strict=True)
    )
    known = {"files": tuple(files), "stamps": stamps, "form": FORM}
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors come as exceptions, too
    try:
        return Dataset.from_generator(_like_rows_of, gen_kwargs=known)
    except Exception:  # also of a cache that cannot be written; what the rows lack is told below
        if Path(files[0]).suffix != ".csv":
            for file in files:
                blame(file)
        return read_whole(files)


def _like_rows_of(
    files: Sequence[str], stamps: Sequence[Any], form: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows while each has the columns of the first, and all known keys their types."""
    types: dict[tuple[str, ...], type] = {}
    columns = None
    for index, row in enumerate(_rows_of(files)):
        columns = columns or row.keys()
        if not row or row.keys() != columns:
            raise ValueError("rows of several columns")
        for path, kind in _types((), row):
            if index >= SEEN and path not in types:
                raise ValueError("a key that comes late")
            if types.setdefault(path, kind) is not kind:
                raise ValueError("values of several types")
        yield row


def _types(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], type]]:
    """Yield the type of each value within a value that is not null, by where it lies."""
    if value is None:
        return
    if problem := _problem(value, len(path)):
        raise ValueError(problem)
    yield path, type(value)
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _types((*path, key), part)
    elif isinstance(value, list):
        for part in value:
            yield from _types((*path, "[]"), part)


def _rows_of(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        if Path(file).suffix == ".csv":
            yield from _rows_of_csv(file)
            continue
        if Path(file).suffix == ".json":
            try:
                whole = _parsed(Path(file).read_bytes(), named(file))
                yield from whole if isinstance(whole, list) else [whole]
                continue
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Extra data"):
                    raise
        for number, raw in lines_of(file):
            yield _parsed(raw, f"{named(file)}: line {number}")


def _parsed(raw: bytes, where: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: {shown(twice)} is there twice in {shown(found)}; keep one")
        return found

    return json.loads(raw, object_pairs_hook=mapping)


def _rows_of_csv(file: str) -> Iterator[dict[str, Any]]:
    """Yield the rows below the header: a cell is what stands there, and an empty one null."""
    rows = csv_rows(file)
    line, header = next(rows, (1, []))
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{named(file)}: line {line}: two columns of the name {shown(name)}; rename one"
            )
    for line, cells in rows:
        if len(cells) != len(names):
            raise UserError(
                f"{named(file)}: line {line}: expected {len(names)} cells, as in the header, got "
                f"{len(cells)}; put a text that holds commas in quotes"
            )
        yield {name: cell or None for name, cell in zip(names, cells, strict=True)}


def read_whole(files: Sequence[str]) -> Dataset:
    """Return the rows of files that `check_file`, and of JSON `blame`, found nothing wrong with.

    For rows of which some have keys that others lack, within a turn too.

    Raises:
        UserError: a column holds values of several types, or what is half a character.
    """
    rows: list[dict[str, Any]] = []
    for row in _rows_of(files):
        _check_row(row, files, len(rows))
        rows.append(row)
    if not rows:
        raise UserError(f"{named(files[0])}: expected at least one row, got none; name other data")
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [_flat(row.get(key), key) for row in rows] for key in keys}
    for name, values in columns.items():
        if not _go_together(values):
            odd = bisect(range(1, len(values)), 0, key=lambda n: not _go_together(values[:n]))
            first = next((value for value in values if value is not None), None)
            raise UserError(
                f"{place_of(files, odd)}: expected {named(name)} to be as in the rows before it "
                f"({shown(first)}), got {shown(values[odd])}; bring all rows to one form"
            )
    return Dataset.from_dict(columns)


def _check_row(row: Any, files: Sequence[str], index: int) -> None:
    if not isinstance(row, dict) or not row:
        raise UserError(
            f"{place_of(files, index)}: expected a row with named columns, got {shown(row)}; "
            "correct it"
        )
    if problem := next(_problems(row, 0), None):
        raise UserError(f"{place_of(files, index)}: expected {problem}; correct it")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(
            f"{place_of(files, index)}: expected characters, got half of one ({half}); correct it"
        ) from None


def _problems(value: Any, depth: int) -> Iterator[str]:
    """Yield what is wrong with a value, and with those within."""
    if problem := _problem(value, depth):
        yield problem
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _problems(part, depth + 1)


def _problem(value: Any, depth: int) -> str | None:
    """Return what no table holds of a value: what was expected, and what it is."""
    if depth > MAX_DEPTH:
        return f"at most {MAX_DEPTH} lists and objects within each other, got more"
    if isinstance(value, int) and not -MAX_INTEGER <= value < MAX_INTEGER:
        return f"whole numbers of 64 bits, got {shown(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"finite numbers, got {value}"
    return None


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


def _go_together(values: Sequence[Any]) -> bool:
    if len({isinstance(x, bool) for x in values if isinstance(x, int | float)}) > 1:
        return False  # Arrow would make true 1.0
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True
