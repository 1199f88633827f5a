"""Output files and directories that are there whole or not at all; no link is followed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedex_scale.runtime.errors import UserError

_MARK = "fedex-scale"
PLAIN_HANDLERS: list[object] = [signal.SIG_DFL, signal.default_int_handler]
"""Of signals that end this process: those that may be replaced while there is much to clean up."""


class Interrupted(SystemExit):
    """A signal ended a command that leaves nothing behind; the exit code is 128 + its number."""

    def __init__(self, number: int, what: object) -> None:
        super().__init__(128 + number)
        name = signal.Signals(number).name
        self.message = f"{what}: stopped by {name}; nothing was left behind"


def check_out(out: Path, *, apart_from: Path | None = None) -> None:
    """Raise a UserError where an output directory would overwrite something or lie in its input."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; choose another output directory, or delete it")
    if apart_from is not None and apart_from.resolve() in out.resolve().parents:
        raise UserError(
            f"{out}: lies inside {apart_from}, which must stay as it is; choose another"
        )


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file whole, text as UTF-8; what lay there, such as a link, is replaced.

    It is on disk before it has its name.

    Raises:
        UserError: a directory has its name.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync(path.parent)
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file there, got a directory; delete it") from None
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


def make_parents(folder: Path) -> None:
    """Make a directory, and those above it that are not there; their names are on disk then."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextmanager
def building(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """Give a directory beside `out` to write to, which becomes `out` if all went well.

    Every byte is on disk before it has its name. Otherwise, or when this process is told to end,
    it is deleted; one that a killed process left is deleted by the next.

    Args:
        num_bytes: what will be written.

    Raises:
        UserError: no room, the disk cannot be written, or another process is making it.
    """
    parent = out.resolve().parent
    with _disk_told(out):
        make_parents(parent)
        free = shutil.disk_usage(parent).free
        if num_bytes > free:
            raise UserError(
                f"{out}: expected {_size(num_bytes)} of room, got {_size(free)}; "
                "free some space or choose another disk"
            )
        with _scratch(parent, out) as scratch:
            with ending_cleanly(out):
                yield scratch
                sync_tree(scratch)
            scratch.rename(parent / out.name)
            sync(parent)


@contextmanager
def adding(out: Path) -> Iterator[Path]:
    """Give a directory whose files take their places in `out`, in order, if all went well.

    What else lies in `out` stays. Where it is not there, it is made at one stroke.

    Raises:
        UserError: as `building` does; or a place in `out` is a link to elsewhere.
    """
    if not out.exists():
        with building(out, num_bytes=0) as scratch:
            yield scratch
        return
    make_inside(out)
    with _disk_told(out), _scratch(out, out / "report") as scratch:
        with ending_cleanly(out):
            yield scratch
            sync_tree(scratch)
        files = sorted(file for file in scratch.rglob("*") if file.is_file())
        for file in files:
            place = out / file.relative_to(scratch)
            make_inside(place.parent)
            file.replace(place)
        for folder in {(out / file.relative_to(scratch)).parent for file in files}:
            sync(folder)


@contextmanager
def ending_cleanly(what: object) -> Iterator[None]:
    """Let a request to end this process run what is to be cleaned up, and say so.

    Where the process has its own answer to such requests, it keeps it.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    own = [number for number in numbers if signal.getsignal(number) in PLAIN_HANDLERS]

    def end(number: int, frame: object) -> None:
        raise Interrupted(number, what)

    before = {number: signal.signal(number, end) for number in own}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file that dies with this process; it is gone afterwards.

    Raises:
        OSError: it cannot be made.
        UserError: another process holds it; the message says what it works on, and its number.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        number = os.open(path, flags, 0o644)
        try:
            if not _try_lock(number):
                holder = os.read(number, 20).decode(errors="replace").strip()
                raise UserError(
                    f"{what}: process {holder or 'unknown'} is at work there; wait for its end, or "
                    "choose another"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), os.stat(path)):
                    break  # else its last holder deleted it in between
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        os.truncate(number, 0)
        os.write(number, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(number)


def sync(path: Path) -> None:
    """Let a file's bytes, or a directory's names, reach the disk."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(top: Path) -> None:
    """Let all files below reach the disk, and then their names."""
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


@contextmanager
def _scratch(parent: Path, out: Path) -> Iterator[Path]:
    """Make a directory of a name of its own, locked while this process lives; then delete it.

    Those of the same output that dead processes left are deleted.

    Raises:
        UserError: a living process has one.
    """
    name = out.name if len(os.fsencode(out.name)) < 200 else _digest(out.name)
    number = None
    with _locked_directory(parent):  # so that of two that begin at once, one sees the other
        stale = re.compile(rf"\.{re.escape(name)}\.{_MARK}-[0-9a-f]{{16}}")
        for old in [x for x in parent.iterdir() if stale.fullmatch(x.name)]:
            _remove_dead(old, out)
        scratch = parent / f".{name}.{_MARK}-{secrets.token_hex(8)}"
        scratch.mkdir()
        number = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        _try_lock(number)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(number)


def _remove_dead(old: Path, out: Path) -> None:
    try:
        number = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # a link, or somebody else's
        return
    try:
        if not _try_lock(number):
            raise UserError(
                f"{out}: another process is making it, in {old}; wait for its end, or choose "
                "another output directory"
            )
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(number)


@contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _try_lock(number: int) -> bool:
    """Take the lock of an open file, and return whether that could be; true without locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _disk_told(out: Path) -> Iterator[None]:
    """Turn an error of the disk into one line; what was made is deleted by then."""
    try:
        yield
    except OSError as error:
        own = _MARK in str(error.filename or _MARK)
        where = out if own else error.filename
        raise UserError(
            f"{where}: cannot be written or read ({error.strerror}); nothing was left behind"
        ) from None


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e3:,.0f} kB"
