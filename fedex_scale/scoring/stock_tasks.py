"""lm-eval's own tasks on local rows: which of a task's splits are needed, and from which files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedex_scale.runtime.errors import UserError

SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")


def local_files(
    task: str,
    cfg: Mapping[str, Any],
    shots: int,
    *,
    named: str | Mapping[str, str] | None,
    root: Path,
) -> dict[str, str]:
    """Return split -> file: those that are named, or all that are needed below `root`, or none.

    Args:
        cfg: the task's YAML, with what it includes.
        shots: examples in a prompt; with 0 only the scored split is needed.
        named: split -> file, or the scored split's file.

    Raises:
        UserError: files are named, but not for every split that is needed.
    """
    scored, examples = scored_split(cfg), _examples_split(cfg) if shots else None
    needed = {scored: "which is scored", examples: f"from which its {shots} examples come"}
    needed.pop(None, None)
    if named is None:
        found = {split: root / task / f"{split}.jsonl" for split in needed}
        local = all(path.is_file() for path in found.values())
        return {split: str(path) for split, path in found.items()} if local else {}
    files = named if isinstance(named, Mapping) else {scored: named}
    for split, use in needed.items():
        if split not in files:
            raise UserError(
                f"evaluation.data: {task}: expected a file for {split}, {use}, got one for "
                f"{', '.join(files) or 'none'}; "
                f"give {{{', '.join(f'{split}: FILE' for split in needed)}}}"
            )
    return {split: files[split] for split in needed}


def reading(files: Mapping[str, str], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task's YAML says instead, to read these files.

    Of a split without a file nothing is read; lm-eval would look for it, used or not.
    """
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return data | {key: None for key in SPLITS if cfg.get(key) not in files}


def scored_split(cfg: Mapping[str, Any] | None) -> str | None:
    """Return the split that is scored; none: a group."""
    cfg = cfg or {}
    return cfg.get("test_split") or cfg.get("validation_split")


def _examples_split(cfg: Mapping[str, Any]) -> str | None:
    """Return the split that a task's examples come from; none: it brings them along."""
    own = cfg.get("fewshot_config") or {}
    if own.get("samples"):
        return None
    splits = cfg.get("fewshot_split"), own.get("split"), *map(cfg.get, SPLITS[1:])
    return next(filter(None, splits))
