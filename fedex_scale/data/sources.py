"""Where the rows come from: the hub, or local files in the same schemas."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from fedex_scale.config.federation import PartitionConfig
from fedex_scale.config.learning import DataConfig
from fedex_scale.config.sites import SUFFIXES, Site, check_sites, find_sites
from fedex_scale.config.words import named, shown
from fedex_scale.data import places
from fedex_scale.data.prompts import Schema, recognise, schema_of
from fedex_scale.data.textfiles import read_texts
from fedex_scale.runtime.errors import UserError

DATA_DIR_VARIABLE = "FEDEX_SCALE_DATA"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Rows that were read from one place.

    Fields:
        source: the place, as the user would name it.
        files: local ones, in the order that they were read; none of the hub's.
        schema: what a row is; never auto.
        chosen: which of the place's rows these are; none: all.
        site: the client that has them; none: they are dealt out.
    """

    rows: Dataset
    source: str
    files: tuple[str, ...]
    schema: str
    chosen: np.ndarray | None = None
    site: str | None = None

    def place(self, index: int) -> str:
        """Return where a row stands, for an error."""
        at = index if self.chosen is None else int(self.chosen[index])
        return places.place_of(self.files, at) if self.files else f"{self.source}: row {at + 1}"


def load_rows(config: DataConfig, seed: int) -> Dataset:
    """Return the rows of `load_pool`."""
    return load_pool(config, seed).rows


def load_pool(config: DataConfig, seed: int) -> Pool:
    """Return the rows that the config chooses, with all their columns.

    Args:
        seed: for select: random; the same seed chooses the same rows of the same data.

    Raises:
        UserError: no such file or dataset, no rows, columns that no schema is known by, a column
            that the schema needs is missing, or fewer rows than num_examples.
    """
    pool = _checked(*_read(config), config)
    if config.num_examples is None:
        return pool
    chosen = choose(len(pool.rows), config, seed, pool.source)
    return replace(pool, rows=pool.rows.select(chosen), chosen=chosen)


def choose(count: int, config: DataConfig, seed: int, source: str) -> np.ndarray:
    """Return which of so many rows the config asks for, in their order.

    Raises:
        UserError: there are fewer.
    """
    wanted = count if config.num_examples is None else config.num_examples
    if wanted > count:
        raise UserError(
            f"data.num_examples: expected at most the {count} rows of {source}, got {wanted}; "
            "lower it or leave it out for all"
        )
    if config.select == "first":
        return np.arange(wanted)
    draw = np.random.Generator(np.random.PCG64(seed))
    return np.sort(draw.choice(count, size=wanted, replace=False))


def read_rows(config: DataConfig) -> tuple[str, Dataset]:
    """Return what was read, as the user would name it, and all its rows, of any columns."""
    source, _, rows = _read(config)
    return source, rows


def load_sites(config: DataConfig, partition: PartitionConfig) -> list[Pool]:
    """Return each site's rows.

    Raises:
        UserError: as `load_pool`; no site, one without rows, two of one name, of different schemas,
            or not as many as the config has clients.
    """
    sites = find_sites(partition.files)
    _check_sites(sites, partition)
    pools: list[Pool] = []
    owners: dict[str, str] = {}
    for site in sites:
        files = site.files()
        for file in map(os.path.realpath, files):
            if owners.setdefault(file, site.name) != site.name:
                raise UserError(
                    f"partition.files: {named(file)} is of two sites, {named(owners[file])} and "
                    f"{named(site.name)}; give it to one"
                )
        if not files:
            raise UserError(
                f"partition.files: {named(site.path)}: expected a {', '.join(SUFFIXES)} file in "
                "it, found none; take the site out"
            )
        rows = _read_files(files, site.path, "partition.files")
        pool = _checked(site.path, files, rows, config)
        if pools and pool.schema != pools[0].schema:
            raise UserError(
                f"partition.files: {named(pools[0].source)} is {pools[0].schema}, but "
                f"{named(site.path)} is {pool.schema}; bring all sites to one schema"
            )
        pools.append(replace(pool, site=site.name))
    return pools


def read_held_out(file: str, like: Pool, config: DataConfig, trained: Sequence[str]) -> Pool:
    """Return the rows of a file of their own, of the schema of the training rows.

    Args:
        trained: the files of the training rows.

    Raises:
        UserError: as `load_pool`; one of the files is trained.
    """
    files = _found(file, "data.holdout")
    own = set(map(os.path.realpath, files))
    for path in trained:
        if os.path.realpath(path) in own:
            raise UserError(
                f"data.holdout: expected a file that nobody trains on, got {named(path)}, which is "
                "among the training files; take it out of data.path or partition.files"
            )
    rows = _read_files(files, file, "data.holdout")
    return _checked(file, tuple(files), rows, config, schema=like.schema)


def read_files(pattern: str, key: str) -> Dataset:
    """Return all rows of the files; `key` is what the user would change."""
    return _read_files(_found(pattern, key), pattern, key)


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


def cause_of(error: BaseException) -> str:
    """Return the first line of what went wrong at the root."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_sites(sites: Sequence[Site], partition: PartitionConfig) -> None:
    """Raise a UserError for no sites, two of one name, or another number than of clients."""
    patterns = shown(partition.files)
    check_sites(partition.files)
    if len(sites) != partition.num_clients:
        raise UserError(
            f"partition.num_clients: sites has a client per file or directory ({len(sites)} at "
            f"{patterns}), got {partition.num_clients}; leave it out"
        )
    by_name: dict[str, str] = {}
    for site in sites:
        if site.name in by_name:
            raise UserError(
                f"partition.files: two sites of the name {named(site.name)}, "
                f"{named(by_name[site.name])} and {named(site.path)}; rename one, or name the "
                "directories that they lie in"
            )
        by_name[site.name] = site.path


def _read(config: DataConfig) -> tuple[str, tuple[str, ...], Dataset]:
    """Return what was read, as the user would name it, its local files, and all its rows."""
    data_dir = config.data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if data_dir and config.local:
        source, key = str(Path(data_dir) / config.local), "data.local"
    elif _is_hub_id(config.path):
        return config.path, (), _read_hub(config)
    else:
        source, key = config.path, "data.path"
    files = _found(source, key)
    return source, tuple(files), _read_files(files, source, key)


def _is_hub_id(path: str) -> bool:
    """Tell a hub id from a file or glob; a directory is read as a copy of a hub dataset."""
    named = re.fullmatch(r"[\w-]+|[\w.-]+/[\w.-]+", path) and Path(path).suffix not in SUFFIXES
    return Path(path).is_dir() or (bool(named) and not Path(path).is_file())


def _found(pattern: str, key: str) -> list[str]:
    """Return the files that a path or glob names."""
    if (suffix := Path(pattern).suffix) not in SUFFIXES:
        remedy = f"rename it to {suffix.lower()}" if suffix.lower() in SUFFIXES else "convert it"
        raise UserError(
            f"{key}: expected a {', '.join(SUFFIXES)} file or a hub id, got {pattern}; "
            f"{remedy}, or name a hub dataset"
        )
    fixed = Path(pattern.partition("**")[0])
    if "**" in pattern and len(fixed.parts) < 2 and fixed.is_absolute():
        raise UserError(f"{key}: expected files of a folder, got {pattern}; name one")
    files = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(file for file in files if os.path.isfile(file))
    if not files:
        raise UserError(f"{key}: expected a file, found none at {pattern}; correct the path")
    return files


def _read_files(files: Sequence[str], source: str, key: str) -> Dataset:
    """Return all rows of the files, which are of one kind."""
    kinds = sorted({Path(file).suffix for file in files})
    if len(kinds) > 1 or kinds[0] not in SUFFIXES:
        raise UserError(
            f"{key}: {named(source)}: expected files of one kind of {', '.join(SUFFIXES)}, got "
            f"{', '.join(kinds)}; convert them"
        )
    if not any(map(os.path.getsize, files)):
        raise UserError(f"{named(source)}: expected at least one row, got none; name other data")
    for file in files if kinds[0] != ".parquet" else ():
        places.check_file(file)
    if kinds[0] != ".parquet":
        return read_texts(files)
    return load(source, "look at the file", "parquet", data_files=list(files), split="train")


def _read_hub(config: DataConfig) -> Dataset:
    remedy = "check the name and the network, or name a local file"
    if config.local:
        remedy += f", or set data.data_dir to where {config.local} lies"
    return load(config.path, remedy, config.path, config.name, split=config.split)


def _checked(
    source: str, files: tuple[str, ...], rows: Dataset, config: DataConfig, schema: str = "auto"
) -> Pool:
    """Return the rows with their schema, whose columns they have."""
    name = config.schema if schema == "auto" else schema
    if name == "auto":
        name = recognise(rows[0], source)
    pool = Pool(rows=rows, source=source, files=files, schema=name)
    known = schema_of(config, name, rows.column_names)
    for column in known.columns:
        if column not in rows.column_names:
            raise UserError(
                f"{source}: data.schema={name} needs a column {column}, got "
                f"{', '.join(rows.column_names)}; choose another data.schema, or columns with "
                "data.prompt_column and data.response_column"
            )
    _check_one_schema(pool, known)
    if name == "commonsense" and any(rows["input"] if "input" in rows.features else ()):
        raise UserError(
            f"{source}: expected every input to be empty, as in Commonsense170K, got others; "
            "join them to the instruction and use data.schema=columns"
        )
    return pool


def _check_one_schema(pool: Pool, schema: Schema) -> None:
    """Raise a UserError for the first row that has none of the schema's columns."""
    counts = [pool.rows.data.column(column).null_count for column in schema.columns]
    if not min(counts):
        return
    columns = [pool.rows[column] for column in schema.columns]
    for index, values in enumerate(zip(*columns, strict=True)):
        if all(value is None for value in values):
            raise UserError(
                f"{pool.place(index)}: expected {' and '.join(schema.columns)} as in other rows "
                f"(data.schema={pool.schema}), got none; take the row out"
            )
