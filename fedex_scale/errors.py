"""The exceptions that a user is meant to see."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right, told on one line: what, expected, got, remedy.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ClientFailure(UserError):
    """One client's loss or adapter is no longer finite; the others may be sound."""
