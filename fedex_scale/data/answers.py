"""Reading a model's answer out of what it wrote.

Two rules for a number. `paper_number` is the one that the published scores were made with; it
cuts `1,234,567` to 1234 and rounds. `correct_number` reads the number that stands there. A score
says which of them it used.
Source: the answer formats of MetaMathQA and GSM8K.
"""

from __future__ import annotations

import re
from fractions import Fraction

from fedex_scale.errors import UserError

ANSWER_MARKER = "The answer is: "
GOLD_MARKER = "#### "

_PAPER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s?\$?\s?"
    r"(?P<top>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<bottom>\d+))?",
    re.ASCII,
)


def paper_number(text: str) -> int | None:
    """Return the answer by the papers' rule, rounded; None where there is none.

    After the last `The answer is: `, the first match of `[\\-+]?\\d*[\\.,/]?\\d+`, with commas
    dropped and a fraction evaluated. Source: arXiv:2309.12284 (MetaMath), evaluation.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER)
    match = _PAPER.search(tail) if marker else None
    if match is None:
        return None
    try:
        return round(Fraction(match.group().replace(",", "")))
    except (ValueError, ZeroDivisionError):  # such as /5 and 5/0
        return None


def correct_number(text: str) -> Fraction | None:
    """Return the first number after the last marker, exactly; None where there is none.

    Takes signs, dollars, decimals, fractions and thousands grouped by commas. Nothing is rounded,
    so that 3.6 is not 4.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER.rstrip())
    match = _NUMBER.search(tail) if marker else None
    if match is None:
        return None
    try:
        value = Fraction(match["top"].replace(",", "")) / Fraction(match["bottom"] or 1)
    except (ValueError, ZeroDivisionError):  # a denominator of 0, or thousands of digits
        return None
    return -value if match["sign"] in ("-", "\u2212") else value


def gold_number(answer: str) -> int:
    """Return the integer after `#### ` of a GSM8K answer.

    Raises:
        UserError: there is none.
    """
    _, marker, tail = answer.rpartition(GOLD_MARKER)
    try:
        return int(tail.strip().replace(",", "") if marker else "")
    except ValueError:
        raise UserError(
            f"GSM8K answer: expected it to end in '{GOLD_MARKER}N', got ...{answer[-40:]!r}; "
            "use rows of GSM8K's own format"
        ) from None
