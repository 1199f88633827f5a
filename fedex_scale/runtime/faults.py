"""What goes wrong around a run: signals, ranks that die, full disks and full memory."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from fedex_scale.runtime import distributed, launched
from fedex_scale.runtime.errors import UserError

GRACE_S = 10.0
"""A rank that is gone for so long takes this one down."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")


class Stopped(SystemExit):
    """A signal asked the run to stop; the exit code is 128 + its number."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(128 + number)
        self.message = (
            f"stopped by {signal.Signals(number).name} {where}; the same command with --resume "
            "goes on"
        )


class _Asked:
    """The signal that came, and whether the run now looks for it between steps."""

    number = 0
    since = 0.0
    deferred = False
    gone: str | None = None
    """What was to be told of a dead rank when the signal came: launchers end the others so."""


@contextmanager
def handling_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the run at a place from where it can go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Asked.number, _Asked.gone = 0, None
    hears, told = socket.socketpair()
    told.setblocking(False)
    threading.Thread(target=_acknowledge, args=(hears,), daemon=True).start()
    heard_before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    before = {x: signal.signal(x, _on_signal) for x in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(heard_before)
        told.close()


@contextmanager
def deferring() -> Iterator[None]:
    """Let signals wait for `asked_to_stop`; elsewhere they end the run at once."""
    _Asked.deferred = True
    try:
        yield
    finally:
        _Asked.deferred = False


def asked_to_stop() -> int:
    """Return the signal that came to any rank, 0 for none; every rank must take part."""
    if distributed.world_size() == 1:
        return _Asked.number
    number = torch.tensor(_Asked.number, device=distributed.device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def _on_signal(number: int, frame: object) -> None:
    again = _Asked.number and time.monotonic() - _Asked.since > 3  # launchers repeat Ctrl-C
    if not _Asked.number:
        _Asked.number, _Asked.since = number, time.monotonic()
    if again or not _Asked.deferred:
        raise Stopped(number, "between two steps")


def _acknowledge(hears: socket.socket) -> None:
    """Say at once that a signal came: the main thread may not come to it before a step is done."""
    with hears:
        while number := hears.recv(1):
            name = signal.Signals(number[0]).name
            _Asked.gone = None if _Peers.launcher == _GONE else dead_peer()
            if not launched.is_first() or number[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            then = "stopping"
            if _Asked.deferred:
                then = (
                    "this step ends, then the run saves its place and stops; again, after 3 s: "
                    "it stops at once, and goes on from the last checkpoint"
                )
            print(f"{name}: {then}", file=sys.stderr, flush=True)
            return


def watch_peers() -> None:
    """End this process soon after another rank of this machine died, or the launcher did.

    A collective would wait for half an hour, and not every launcher ends the others.
    """
    if distributed.world_size() == 1:
        return
    peers: list = [None] * distributed.world_size()
    dist.all_gather_object(peers, (socket.gethostname(), os.getpid()))
    _Peers.ids = {
        rank: number
        for rank, (host, number) in enumerate(peers)
        if host == socket.gethostname() and rank != distributed.rank()
    }
    _Peers.parent = os.getppid()
    _Peers.launcher = _deepspeed_launcher(_Peers.parent)
    threading.Thread(target=_watch, daemon=True).start()


_GONE = -1


class _Peers:
    """Process ids of the other ranks on this machine, and of what started this one."""

    ids: dict[int, int] = {}  # noqa: RUF012
    parent = 0
    launcher = 0


def _deepspeed_launcher(parent: int) -> int:
    """Return the process of `deepspeed`, where that has another between itself and the ranks.

    A signal ends it, and is not handed on.
    """
    try:
        between = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return 0
    return _parent_of(parent) if b"deepspeed.launcher.launch" in between else 0


def _parent_of(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _watch() -> None:
    while True:
        time.sleep(1)
        if _Peers.launcher > 0 and _parent_of(_Peers.parent) not in (0, _Peers.launcher):
            _Peers.launcher = _GONE
            os.kill(os.getpid(), signal.SIGTERM)
        gone = dead_peer()
        if gone is None and os.getppid() == _Peers.parent:
            continue
        time.sleep(GRACE_S)  # the main thread may know better what to say
        if gone is not None and is_speaker():
            print(f"error: {gone}", file=sys.stderr, flush=True)
        os._exit(1)


def dead_peer() -> str | None:
    """Return a line that names a rank of this machine that is gone, or None."""
    for rank, number in _Peers.ids.items():
        if not _is_alive(number):
            return (
                f"rank {rank} (process {number}) ended before its time, killed or out of memory; "
                "the same command with --resume goes on"
            )
    return None


def died_first() -> str | None:
    """Return the same of a rank that was gone before a signal came to this one."""
    return _Asked.gone if _Asked.number else dead_peer()


def is_speaker() -> bool:
    """Return whether no lower rank of this machine is left to speak for all."""
    lower = (number for rank, number in _Peers.ids.items() if rank < distributed.rank())
    return not any(map(_is_alive, lower))


def _is_alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc/self/stat").exists()  # no such system: take it to be alive
    return state not in "ZX"


def explain(error: BaseException) -> str | None:
    """Return one line for a fault of the machine that a user can do something about."""
    text = str(error).lower()
    if isinstance(error, OSError) and (error.errno in _FULL or "no space left" in text):
        return (
            f"{error.filename or 'run.dir'}: the disk is full; free some space, "
            "and the same command with --resume goes on"
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return (
            "out of memory; lower train.micro_batch_size (or micro_batch_tokens), or set "
            "model.gradient_checkpointing=true, or engine.deepspeed=zero3_offload; the same "
            "command with --resume goes on"
        )
    if isinstance(error, RuntimeError) and any(words in text for words in _LOST_PEER):
        deadline = time.monotonic() + 2  # the other's last breath
        while (gone := dead_peer()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return gone or "another rank is gone; the same command with --resume goes on"
    return None


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an error of the disk into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = explain(error) or f"{what}: cannot be written ({error.strerror}); look at its disk"
        raise UserError(reason) from None
