"""Which clients a list of files, directories and globs means: one each, by its name."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedex_scale.config.words import named
from fedex_scale.runtime.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Site:
    """One client's data.

    Fields:
        name: of its file, without the suffix, or of its directory.
        path: the file or directory.
    """

    name: str
    path: str

    def files(self) -> tuple[str, ...]:
        """Return the data files that it has, in the order of their names."""
        path = Path(self.path)
        if not path.is_dir():
            return (self.path,)
        found = (file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        return tuple(sorted(map(str, found)))


def find_sites(patterns: Any) -> list[Site]:
    """Return the sites that are there, in the order given and, of a glob, in that of their names.

    Names may be there twice, and a directory without data files: that is for who reads them to
    tell. Whatever is no text, or names nothing, is none. Settings that others have written are
    looked at so, too: no directory is gone through.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns or ()
    sites = []
    for pattern in patterns if isinstance(patterns, list | tuple) else ():
        for found in _matches(pattern) if isinstance(pattern, str) else ():
            path = Path(found)
            sites.append(Site(path.resolve().name if path.is_dir() else path.stem, found))
    return sites


def check_sites(patterns: str | tuple[str, ...]) -> None:
    """Raise a UserError for the first file, directory or glob that leads to nothing."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not _matches(pattern):
            raise UserError(
                f"partition.files: expected a file or directory, found none at {named(pattern)}; "
                "correct it, or take it out"
            )


def _matches(pattern: str) -> list[str]:
    try:
        there = Path(pattern).exists()  # a name may hold a bracket
    except (OSError, ValueError):  # a name that no file can have
        return []
    return [pattern] if there else sorted(glob.glob(pattern))
