"""What callers from Python give, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from fedex_scale.runtime.errors import UserError


def listed(given: Any, name: str) -> Iterable[Any]:
    """Take one for a list of one."""
    if isinstance(given, str | os.PathLike):
        return [given]
    if not isinstance(given, Iterable):
        raise UserError(f"{name}: expected a list, got {given!r}; give one")
    return given


def path_of(given: Any, name: str) -> str:
    """Return a path, or a hub id, as text."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{name}: expected a path, got {given!r}; give one")
    return os.fspath(given)
