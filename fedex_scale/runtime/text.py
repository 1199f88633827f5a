"""Text from elsewhere as a person reads it: no control characters, and not without end."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

MAX_CHARS, MAX_WORD = 3000, 400
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]{1,1000}@")
_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def readable(text: object, *, most: int = MAX_CHARS) -> str:
    """Return text for a terminal, a log or a page, on as many lines as it has.

    What would move a cursor, colour, or turn the order of letters is written as an escape, and so
    is half a surrogate pair, which no file can hold. Long words and texts lose their middle, and
    addresses whoever would log in there.
    """
    whole = str(text)
    if len(whole) > 4 * most:  # before every character is looked at
        whole = _cut(whole, 4 * most)
    if not whole.isprintable():
        whole = "".join(x if x.isprintable() or x in "\n\t" else _escape(x) for x in whole)
    whole = _CREDENTIALS.sub("***@", whole)
    if len(whole) > MAX_WORD:
        whole = _WORD.sub(lambda found: _cut(found[0], MAX_WORD), whole)
    return _cut(whole, most)


def one_line(text: object, *, most: int = MAX_CHARS) -> str:
    """Return the same on one line."""
    whole = str(text)
    if len(whole) > 4 * most:
        whole = _cut(whole, 4 * most)
    return readable(" ".join(whole.split()), most=most)


def cell(text: object) -> Text:
    """Return text for a table of rich, which takes it for no markup."""
    from rich.text import Text

    return Text(one_line(text, most=200))


class ReadableFormatter(logging.Formatter):
    """Formats a log's lines; what they quote from elsewhere stays text."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record), most=20_000)  # with a traceback


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]}...{text[head + 3 - most :]}"
