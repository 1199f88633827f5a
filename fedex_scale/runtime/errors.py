"""The exceptions that a user is meant to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedex_scale.runtime.text import one_line


class UserError(ValueError):
    """Something the user can put right, told on one line: what, expected, got, remedy.

    The command line prints it without a traceback and exits with code 2. What it quotes from
    elsewhere is escaped and cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ClientFailure(UserError):
    """One client's loss or adapter is no longer finite; the others may be sound."""


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn what a damaged file leads to while it is read into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged ({reason:.200}); {remedy}") from None
