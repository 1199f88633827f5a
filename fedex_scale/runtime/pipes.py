"""Standard output that may be closed, or full: the work goes on without it."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class Lasting:
    """A text stream that falls silent when it takes no more, instead of ending the work."""

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
        except OSError as error:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, self._stream.fileno())
            os.close(silence)
            if self._stream is not sys.__stderr__:
                closed = isinstance(error, BrokenPipeError)
                why = "was closed" if closed else f"cannot be written ({error.strerror})"
                told = f"fedex-scale: standard output {why}; going on without it"
                print(told, file=sys.stderr, flush=True)
            return None


def make_lasting() -> None:
    """Let standard output and errors survive a closed pipe, and letters that they do not have.

    Those that were closed from the beginning lead nowhere, lest a file of ours takes their number.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        stream = getattr(sys, name)
        if isinstance(stream, Lasting) or not hasattr(stream, "reconfigure"):
            continue
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Lasting(stream))
