"""Files that come along: lm-eval tasks, DeepSpeed's files, recipes.

In a clone they lie beside the package, in a wheel within it.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedex_scale.config.words import named, nearest
from fedex_scale.runtime.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_IN_CLONE = {"tasks": "eval/tasks", "ds_configs": "ds_configs", "recipes": "launch"}
_SUFFIXES = {"ds_configs": ".json", "recipes": ".yaml"}


def shipped(kind: str) -> Path:
    """Return the directory of what comes along of a kind: tasks, ds_configs or recipes."""
    in_wheel = _PACKAGE / "share" / kind
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / _IN_CLONE[kind]


def names_of(kind: str) -> list[str]:
    """Return the names by which files of a kind are called: zero3 for zero3.json."""
    return sorted(file.stem for file in shipped(kind).glob(f"*{_SUFFIXES[kind]}"))


def locate(kind: str, given: str | os.PathLike[str], key: str) -> Path:
    """Return the file that is meant: a name of one that comes along, or a path to any.

    What has a suffix or a slash is a path, and so is a Path object. A name is never looked for in
    the working directory, so that it means the same everywhere.

    Args:
        key: how the user named it, for the error.

    Raises:
        UserError: a name of none; the nearest is told.
    """
    if not isinstance(given, str) or "/" in given or Path(given).suffix:
        return Path(given)
    if given not in names_of(kind):
        raise UserError(
            f"{key}: expected a name of one that comes along, or a path, got {named(given)}; "
            f"{remedy(kind, given)} (a file of one's own has a suffix or a slash: ./{named(given)})"
        )
    return shipped(kind) / (given + _SUFFIXES[kind])


def remedy(kind: str, given: str | os.PathLike[str]) -> str:
    """Return what to write instead of a name or a path that leads nowhere."""
    known = names_of(kind)
    return nearest(Path(given).stem, known) or f"choose one of {', '.join(known)}, or name a file"
