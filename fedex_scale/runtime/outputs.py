"""Output files and directories that are there whole or not at all; no link is followed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedex_scale.runtime.errors import UserError


def check_out(out: Path, *, apart_from: Path | None = None) -> None:
    """Raise a UserError where an output directory would overwrite something or lie in its input."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; choose another output directory, or delete it")
    if apart_from is not None and apart_from.resolve() in out.resolve().parents:
        raise UserError(
            f"{out}: lies inside {apart_from}, which must stay as it is; choose another"
        )


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file whole, text as UTF-8; what lay there, such as a link, is replaced."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def make_inside(folder: Path) -> None:
    """Make a directory that files are written to, if it is not there.

    Raises:
        UserError: it is a link, and what it leads to is not this directory's to change.
    """
    if folder.is_symlink():
        raise UserError(f"{folder}: expected a directory, got a link to another; delete the link")
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def building(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """Give a directory beside `out` to write to, which becomes `out` if all went well.

    Otherwise, or when this process is told to end, it is deleted.

    Args:
        num_bytes: what will be written.

    Raises:
        UserError: no room, or the disk cannot be written.
    """
    parent = out.resolve().parent
    scratch = parent / f".{out.name}.{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if num_bytes > free:
            raise UserError(
                f"{out}: expected {_gigabytes(num_bytes)} of room, got {_gigabytes(free)}; "
                "free some space or choose another disk"
            )
        scratch.mkdir()
        with _ending_cleanly():
            yield scratch
        scratch.rename(out)
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"{where}: cannot be written or read ({error.strerror}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let a request to end this process run what is to be cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
