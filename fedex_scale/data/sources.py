"""Where the rows come from: the hub, or local files in the same schemas."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from fedex_scale.config.learning import DataConfig
from fedex_scale.data.prompts import SCHEMAS, Schema
from fedex_scale.runtime.errors import UserError

DATA_DIR_VARIABLE = "FEDEX_SCALE_DATA"
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def schema_of(config: DataConfig) -> Schema:
    """Return where the config's rows hold instruction and response."""
    if config.schema == "columns":
        return Schema(config.prompt_column, config.response_column)
    return SCHEMAS[config.schema]


def load_rows(config: DataConfig, seed: int) -> Dataset:
    """Return the rows that the config chooses, with all their columns.

    Args:
        seed: for select: random; the same seed chooses the same rows of the same data.

    Raises:
        UserError: no such file or dataset, no rows, a column that the schema needs is missing or
            has empty cells, or fewer rows than num_examples.
    """
    source, rows = _read(config)
    schema = schema_of(config)
    for column in (schema.instruction, schema.response):
        _check_column(rows, column, source, config)
    if config.schema == "commonsense" and any(rows["input"] if "input" in rows.features else ()):
        raise UserError(
            f"{source}: expected every input to be empty, as in Commonsense170K, got others; "
            "join them to the instruction and use data.schema=columns"
        )
    wanted = config.num_examples
    if wanted is None:
        return rows
    if wanted > len(rows):
        raise UserError(
            f"data.num_examples: expected at most the {len(rows)} rows of {source}, got {wanted}; "
            "lower it or leave it out for all"
        )
    if config.select == "first":
        return rows.select(range(wanted))
    draw = np.random.Generator(np.random.PCG64(seed))
    return rows.select(np.sort(draw.choice(len(rows), size=wanted, replace=False)))


def _read(config: DataConfig) -> tuple[str, Dataset]:
    """Return what was read, as the user would name it, and all its rows."""
    data_dir = config.data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if data_dir and config.local:
        source = str(Path(data_dir) / config.local)
        return source, read_files(source, "data.local")
    if _is_hub_id(config.path):
        return config.path, _read_hub(config)
    return config.path, read_files(config.path, "data.path")


def _is_hub_id(path: str) -> bool:
    """Tell a hub id from a file or glob; a directory is read as a copy of a hub dataset."""
    named = re.fullmatch(r"[\w-]+|[\w.-]+/[\w.-]+", path) and Path(path).suffix not in _BUILDERS
    return Path(path).is_dir() or (bool(named) and not Path(path).is_file())


def read_files(pattern: str, key: str) -> Dataset:
    """Return all rows of the files; `key` is what the user would change."""
    builder = _BUILDERS.get(Path(pattern).suffix)
    if builder is None:
        raise UserError(
            f"{key}: expected a {', '.join(_BUILDERS)} file or a hub id, got {pattern}; "
            "convert it, or name a hub dataset"
        )
    fixed = Path(pattern.partition("**")[0])
    if "**" in pattern and len(fixed.parts) < 2 and fixed.is_absolute():
        raise UserError(f"{key}: expected files of a folder, got {pattern}; name one")
    files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    if not files:
        raise UserError(f"{key}: expected a file, found none at {pattern}; correct the path")
    if not any(map(os.path.getsize, files)):
        raise UserError(f"{pattern}: expected at least one row, got none; name other data")
    return load(pattern, "look at the file", builder, data_files=files, split="train")


def _read_hub(config: DataConfig) -> Dataset:
    remedy = "check the name and the network, or name a local file"
    if config.local:
        remedy += f", or set data.data_dir to where {config.local} lies"
    return load(config.path, remedy, config.path, config.name, split=config.split)


def load(source: str, remedy: str, *args: Any, **kwargs: Any) -> Dataset:
    """Call `load_dataset`; whatever it raises is about the user's data or network."""
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors come as exceptions, too
    try:
        rows = load_dataset(*args, **kwargs)
    except Exception as error:
        raise UserError(f"data: cannot load {source} ({cause_of(error)}); {remedy}") from None
    if len(rows) == 0:
        raise UserError(f"{source}: expected at least one row, got none; name other data")
    return rows


def _check_column(rows: Dataset, column: str, source: str, config: DataConfig) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"{source}: data.schema={config.schema} needs a column {column}, got "
            f"{', '.join(rows.column_names)}; choose another data.schema, or columns with "
            "data.prompt_column and data.response_column"
        )
    missing = rows.data.column(column).null_count
    if missing:
        raise UserError(f"{source}: column {column} is empty in {missing} rows; take them out")


def cause_of(error: BaseException) -> str:
    """Return the first line of what went wrong at the root."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
