"""Which clients a list of files, directories and globs means: one each, by its name."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Site:
    """One client's data.

    Fields:
        name: of its file, without the suffix, or of its directory.
        path: the file or directory.
        files: the data files that it has, in the order of their names.
    """

    name: str
    path: str
    files: tuple[str, ...]


def find_sites(patterns: Any) -> list[Site]:
    """Return the sites that are there, in the order given and, of a glob, in that of their names.

    Names may be there twice, and a directory without data files: that is for who reads them to
    tell. Whatever is no text, or names nothing, is none.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns or ()
    sites = []
    for pattern in patterns if isinstance(patterns, list | tuple) else ():
        for found in _matches(pattern) if isinstance(pattern, str) else ():
            path = Path(found)
            name = path.resolve().name if path.is_dir() else path.stem
            sites.append(Site(name, found, _files_of(path)))
    return sites


def _matches(pattern: str) -> list[str]:
    if Path(pattern).exists():  # a name may hold a bracket
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))


def _files_of(path: Path) -> tuple[str, ...]:
    if not path.is_dir():
        return (str(path),)
    found = (file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    return tuple(sorted(map(str, found)))
