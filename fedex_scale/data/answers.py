"""Reading a model's answer out of what it wrote.

Two rules for a number. `paper_number` is the one that the published scores were made with, quirks
included; `correct_number` reads the number that the answer states. A score says which it used.
Source: the answer formats of MetaMathQA and GSM8K.
"""

from __future__ import annotations

import re
from fractions import Fraction

from fedex_scale.runtime.errors import UserError

ANSWER_MARKER = "The answer is: "
GOLD_MARKER = "#### "

_PAPER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_FRACTION = re.compile(r"\\[dt]?frac *(?:\{(-?[\d.,]+)\}|(\d)) *(?:\{(\d+)\}|(\d))")
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|boxed|left|right)\b|\\[$%!,]|\^\{?\\circ\}?|[{}$]")
_NUMBER = re.compile(
    r"(?P<sign>^[-+\u2212]\s*|[-+\u2212]?)"
    r"(?P<top>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<bottom>\d+)|\s+(?P<part>\d+)\s?/\s?(?P<whole>\d+))?",
    re.ASCII,
)
_END = re.compile(r"[.!?;](?=\s|$)|,\s+(?!\d)")  # of a statement, looked for after its number
_EQUALS = re.compile(r"=|\u2248|\\approx")
# What shows that a number is not all of it: a cut number, an operand, a command as \sqrt and \pi.
_BEFORE = re.compile(r"(?:[-+*/^\u2212\u00d7\u00f7\u221a]\s*|[\w).])$")
_AFTER = re.compile(
    r"^\s?[.,:]?\s?\d|^[eE][-+]?\d|^[\u00b2\u00b3\u00bc-\u00be]"
    r"|(?:[-+*/\u2212\u00d7\u00f7]|(?<!m)(?<!ft|in|yd)\^|(?<![a-z])x)\s*\(?\s*\d"  # m^2
)
_COMMAND = re.compile(r"\\[A-Za-z]")


def paper_number(text: str) -> int | None:
    """Return the answer by the papers' rule, rounded; None where there is none.

    After the last `The answer is: `, the first match of `[\\-+]?\\d*[\\.,/]?\\d+`, as a float:
    commas are dropped, a fraction is evaluated, and 5/0 is 5. So `\\frac{3}{4}` and `3 + 4 = 7` are
    3, and 1,234,567 is 1234. Where the published script stops with an error (5/00), there is none.
    Source: arXiv:2309.12284 (MetaMath), eval_gsm8k.py.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER)
    match = _PAPER.search(tail) if marker else None
    if match is None:
        return None
    top, slash, bottom = match.group().replace(",", "").partition("/")
    try:
        return round(float(top) / float(bottom) if slash and bottom != "0" else float(top))
    except (ValueError, ArithmeticError):  # /5, 5/00, and more digits than a float can tell
        return None


def correct_number(text: str) -> Fraction | None:
    """Return the number that is stated after the last marker, exactly; None where there is none.

    Takes signs, dollars, decimals, thousands grouped by commas, fractions and mixed numbers, in
    LaTeX too, and whatever unit follows. Of an equation it is the side that is a number alone,
    from the right: `3 + 4 = 7` is 7. What goes on after its number (1,2 or 20-30 or 5 * 3 or
    5\\pi) is no number. Nothing is rounded, so that 3.6 is not 4.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER.rstrip())
    line = tail.strip().partition("\n")[0] if marker else ""
    line = _MARKUP.sub("", _FRACTION.sub(r" \1\2/\3\4", line))
    first = _NUMBER.search(line)
    end = _END.search(line, first.end()) if first else None
    sides = _EQUALS.split(line[: end.start()] if end else line)
    return next((x for x in map(_alone, reversed(sides)) if x is not None), None)


def _alone(side: str) -> Fraction | None:
    """Return the number of one side of an equation, unless it is a part of something."""
    side = side.strip(" *_`")
    match = _NUMBER.search(side)
    if match is None or _COMMAND.search(side):
        return None
    if _BEFORE.search(side[: match.start()]) or _AFTER.search(side[match.end() :]):
        return None
    try:
        value = Fraction(match["top"].replace(",", "")) / int(match["bottom"] or 1)
        value += Fraction(int(match["part"] or 0), int(match["whole"] or 1))
    except (ValueError, ZeroDivisionError):  # a denominator of 0, or thousands of digits
        return None
    return -value if match["sign"].strip() in ("-", "\u2212") else value


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
