"""The test rows of a task: a local file where there is one, the hub's dataset otherwise.

The task files of eval/tasks name `load_test_rows` as their dataset, so that plain lm-eval reads
the same rows as this package. Below a data directory they lie as

    gsm8k/test.jsonl    math/test.jsonl    word_problems/heldout.jsonl
    commonsense/{boolq,piqa,social_i_qa,hellaswag,winogrande,ARC-Easy,ARC-Challenge,openbookqa}/test.json
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from fedex_scale.data.sources import DATA_DIR_VARIABLE, load, read_files
from fedex_scale.runtime.errors import UserError

DEFAULT_DATA_DIR = "data"
FOLDERS = ("gsm8k", "math", "word_problems", "commonsense")
"""Of this project's tasks; a stock task's has its own name."""


def load_test_rows(
    *,
    task: str,
    local: str,
    columns: Sequence[Sequence[str]],
    hub: str | None = None,
    names: Sequence[str | None] = (None,),
    split: str = "test",
    data: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    **_: object,
) -> dict[str, Dataset]:
    """Return {"test": rows}, as lm-eval wants a task's `custom_dataset` to do.

    Args:
        local: file below a data directory.
        columns: the schemas that the task reads; the rows must have all columns of one of them.
        hub: dataset id, read where there is no local file.
        names: configurations of the hub's dataset, one after another.
        data: task -> file, read before all else. This and `data_dir` come from lm-eval's metadata.
        data_dir: none: FEDEX_SCALE_DATA, or data/ where that is not set.
        _: the rest of the metadata, such as the task's version.

    Raises:
        UserError: the rows cannot be had, are none, or are of another schema.
    """
    root = data_root(data_dir)
    file = (data or {}).get(task)
    try:
        if file is not None or (root / local).is_file():
            source = str(file or root / local)
            rows = read_files(source, f"evaluation.data: {task}")
        elif hub is None:
            raise UserError(f"no file {root / local}; name one in evaluation.data")
        else:
            source, remedy = hub, f"fill the hub's cache, or put the rows at {root / local}"
            parts = [load(hub, remedy, hub, name, split=split) for name in names]
            rows = concatenate_datasets(parts)
    except UserError as error:
        raise UserError(f"task {task}: {error}") from None
    if not any(set(schema) <= set(rows.column_names) for schema in columns):
        expected = " or ".join(", ".join(schema) for schema in columns)
        raise UserError(
            f"task {task}: expected columns {expected} in {source}, got "
            f"{', '.join(rows.column_names)}; name a file of that schema"
        )
    return {"test": rows}


def files_below(root: Path, tasks: Sequence[str]) -> list[Path]:
    """Return the files below a data directory that tasks may read."""
    folders = dict.fromkeys((*FOLDERS, *tasks))
    return sorted(x for folder in folders for x in (root / folder).glob("*.json*") if x.is_file())


def data_root(data_dir: str | None) -> Path:
    """Return where test sets lie: `data_dir`, else FEDEX_SCALE_DATA, else data/."""
    return Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR)
