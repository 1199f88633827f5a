"""Training rows and held-out rows of the tasks that are scored on rows of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config
from fedex_scale.data.sources import DATA_DIR_VARIABLE, choose, read_rows
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed

Rows = tuple[Dataset, Dataset | None]
"""To train on, and to score on."""


def read(config: Config, columns: Sequence[str]) -> Rows:
    """Return the rows that the config names, which have these columns filled in every row.

    Raises:
        UserError: no such file, dataset or split, a column missing or empty in places, or nothing
            left to train or score on.
    """
    source, rows = read_rows(config.data)
    check_columns(rows, columns, source)
    test = None
    if config.task.test is not None:
        test_source, test = read_rows(_of_test(config))
        check_columns(test, columns, test_source)
    return divide(config, source, rows, test)


def divide(config: Config, source: str, rows: Dataset, test: Dataset | None) -> Rows:
    """Hold rows out where the config says so, and take as many of either as it asks for."""
    seed = config.run.seed
    if config.task.holdout:
        held = held_out(rows, config.task.holdout, config.task.holdout_by, seed, source)
        test = rows.select(np.flatnonzero(held))
        rows = rows.select(np.flatnonzero(~held))
    if config.data.num_examples is not None:
        rows = rows.select(choose(len(rows), config.data, derive_seed(seed, "rows"), source))
    count = config.task.test_examples
    if test is not None and count is not None and count < len(test):
        draw = np.random.Generator(np.random.PCG64(derive_seed(seed, "test")))
        test = test.select(np.sort(draw.choice(len(test), size=count, replace=False)))
    return rows, test


def held_out(rows: Dataset, share: float, by: str | None, seed: int, source: str) -> np.ndarray:
    """Return which rows are held out: a seeded draw of rows, or of the values of a column."""
    if by is None:
        keys: Sequence[Any] = range(len(rows))
    else:
        check_columns(rows, [by], source)
        keys = rows[by]
    distinct = sorted(set(keys), key=str)
    count = min(len(distinct) - 1, max(1, math.floor(share * len(distinct) + 0.5)))
    if count < 1:
        raise UserError(
            f"task.holdout: expected rows of at least two kinds in {source}, got one; set task.test"
        )
    draw = np.random.Generator(np.random.PCG64(derive_seed(seed, "holdout")))
    chosen = {distinct[i] for i in draw.choice(len(distinct), size=count, replace=False)}
    return np.array([key in chosen for key in keys])


def check_columns(rows: Dataset, columns: Sequence[str], source: str) -> None:
    """Raise a UserError for a column that is missing, or empty in a row."""
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"{source}: expected a column {column}, got {', '.join(rows.column_names)}; name "
                "the columns in the section task"
            )
        missing = rows.data.column(column).null_count
        if missing:
            raise UserError(f"{source}: column {column} is empty in {missing} rows; take them out")


def names_of(rows: Dataset, column: str) -> list[str]:
    """Return each row's label by name."""
    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        return [kind.int2str(value) if value >= 0 else str(value) for value in rows[column]]
    return [str(value) for value in rows[column]]


def labels_of(config: Config, rows: Dataset, names: Sequence[str], source: str) -> list[str]:
    """Return the labels in their order: the config's, the dataset's, or sorted by name.

    Raises:
        UserError: fewer than two, or one in the rows that is not among them.
    """
    kind, found = rows.features.get(config.task.label_column), set(names)
    if config.task.labels:
        labels = list(config.task.labels)
    elif isinstance(kind, ClassLabel):
        labels = list(kind.names)
    else:
        labels = sorted(found, key=_in_order)
    if len(found) < 2:
        raise UserError(
            f"{source}: expected rows of at least two labels to train on, got {len(found)} "
            f"({', '.join(sorted(found))}); name other data"
        )
    check_known(names, labels, source)
    return labels


def check_known(names: Sequence[str], labels: Sequence[str], source: str) -> None:
    """Raise a UserError for a label that the head has no place for."""
    unseen = sorted(set(names) - set(labels))
    if unseen:
        raise UserError(
            f"{source}: expected labels among {_few(labels)}, got {_few(unseen)}; take these rows "
            "out, or name all labels in task.labels"
        )


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """Return what a model's config says of its labels."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def test_source(config: Config) -> str:
    """Return how a person would name the held-out rows."""
    return config.task.test or f"the rows held out of {config.data.path}"


def _of_test(config: Config) -> Any:
    """Return the data section that names the held-out rows: a file, or a split on the hub."""
    name = str(config.task.test)
    if Path(name).suffix:
        below = config.data.data_dir or os.environ.get(DATA_DIR_VARIABLE)
        if below and config.data.local and (Path(below) / name).is_file():
            name = str(Path(below) / name)
        return replace(config.data, path=name, local=None, data_dir=None)
    return replace(config.data, split=name)


def _in_order(label: str) -> tuple[bool, float, str]:
    """Let numbers come by size, and before words."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _few(words: Sequence[str]) -> str:
    shown = ", ".join(repr(word)[:40] for word in words[:5])
    return shown + (f" and {len(words) - 5} more" if len(words) > 5 else "")
