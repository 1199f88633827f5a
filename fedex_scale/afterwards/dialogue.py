"""The terminal side of `fedex-scale chat`: lines in, answers out; in a pipe, a question a line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from fedex_scale.afterwards.chat import WHEN, Talker
from fedex_scale.runtime.errors import UserError

HELP = (
    "Tab: the other model, before or after training, answers the last question; /before, /after: "
    "go on with one; /new: forget what was said; Ctrl-C: stop an answer; Ctrl-D: leave"
)


def converse(talker: Talker, when: str) -> None:
    """Answer each line of standard input on standard output, until there is none.

    Args:
        when: which model answers first: `after`, or `before` training.

    Raises:
        UserError: in a pipe, a question that cannot be answered.
    """
    dialogue = _Dialogue(talker, when)
    try:
        if sys.stdin.isatty():
            dialogue.by_hand()
        else:
            dialogue.piped()
    except BrokenPipeError:  # whoever read has enough; Python must not try to flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Dialogue:
    def __init__(self, talker: Talker, when: str) -> None:
        self._talker, self._when = talker, when
        self._last: str | None = None

    def by_hand(self) -> None:
        _bind_tab()
        print(f"{self._talker.name}, {_FORMS[self._talker.form]}. {HELP}", file=sys.stderr)
        while True:
            try:
                line = input(f"\n{self._when}> ")
            except EOFError:
                print()
                return
            try:
                self.take(line.strip())
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def piped(self) -> None:
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                self.take(line.decode().strip())
            except UnicodeDecodeError:
                raise UserError(
                    f"standard input: line {number}: expected UTF-8, got other bytes; convert it"
                ) from None

    def take(self, line: str) -> None:
        """Do what a line says, or answer it."""
        if line == "/other":
            self._when = next(when for when in WHEN if when != self._when)
            if self._last is not None:
                self._talker.take_back()
                print(f"{self._when}, once more: {self._last}", file=sys.stderr)
                self._answer(self._last)
        elif line in ("/before", "/after"):
            self._when = line[1:]
        elif line == "/new":
            self._talker.forget()
            self._last = None
        elif line == "/help":
            print(HELP, file=sys.stderr)
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        with _stopping(self._talker):
            self._talker.ask(question, self._when, lambda text: print(text, end="", flush=True))
        print(flush=True)
        self._last = question


_FORMS = {
    "trained": "asked as in its training data, each question by itself",
    "chat": "in its chat template",
    "none": "nothing put around a question",
}


def _bind_tab() -> None:
    """Let Tab clear the line and type /other."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind(r'"\C-i": "\C-a\C-k/other\C-m"')


@contextlib.contextmanager
def _stopping(talker: Talker) -> Iterator[None]:
    """Let Ctrl-C end the answer, and not the program."""
    before = signal.signal(signal.SIGINT, lambda number, frame: talker.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
