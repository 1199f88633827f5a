"""Standard output that may be closed early, as `| head` does: the work goes on without it."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that falls silent when nobody reads it any more, instead of ending the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or 0

    def writelines(self, lines: list[str]) -> None:
        self._try(self._stream.writelines, lines)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)
            if self._stream is not sys.__stderr__:
                told = "fedex-scale: standard output was closed; going on without it"
                print(told, file=sys.stderr, flush=True)
            return None


def make_lasting() -> None:
    """Let standard output and errors survive a closed pipe, and letters that they do not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Lasting) or not hasattr(stream, "reconfigure"):
            continue
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Lasting(stream))
