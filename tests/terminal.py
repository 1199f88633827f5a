"""A program in a terminal of its own: what it shows, keys, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence


class Terminal:
    """Runs a command in a pseudo-terminal of 160 columns; `seen` is all that it wrote."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.seen, self.code = "", None
        self.began = time.perf_counter()
        self._id, self._end = pty.fork()
        if self._id == 0:
            os.environ.update({"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **(env or {})})
            os.execvp(command[0], list(command))
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            os.kill(self._id, 9)
            os.waitpid(self._id, 0)
        os.close(self._end)

    def send(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait_for(self, text: str, *, times: int = 1, timeout_s: float = 120) -> float:
        """Read until the text was seen so often; return the seconds since the start."""
        until = time.perf_counter() + timeout_s
        while self.seen.count(text) < times:
            assert time.perf_counter() < until, f"{text!r} is not in {self.seen[-2000:]!r}"
            assert self._read(), f"it ended without {text!r}: {self.seen[-2000:]!r}"
        return time.perf_counter() - self.began

    def wait(self) -> int:
        """Read to the end; return the exit code."""
        while self._read():
            pass
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._id, 0)[1])
        return self.code

    def _read(self) -> bool:
        if not select.select([self._end], [], [], 1)[0]:
            return True
        try:
            data = os.read(self._end, 65536)
        except OSError:  # Linux, at the end
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)
