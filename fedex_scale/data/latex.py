"""Answers of MATH: read out of a solution or a generation, and compared.

Two comparisons, reported side by side: Hendrycks' equality of normalised strings, with which the
published scores were made, and math-verify's symbolic equality.
"""

from __future__ import annotations

import re

from fedex_scale.data.answers import ANSWER_MARKER

# What Hendrycks' rule rewrites, in its order.
_REWRITES = (
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),
    (r"\\[td]frac", r"\\frac"),
    (r"\\left|\\right", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$", ""),
    (r"\\text\{ [^\\]*$", ""),  # a unit at the end
    (r"\\?%", ""),
    (r"(^|[ {])\.", r"\g<1>0."),
    (r"^.{0,2}=(?=[^=]*$)", ""),  # k = 5
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)
_REWRITES = tuple((re.compile(pattern), new) for pattern, new in _REWRITES)


def last_boxed(solution: str) -> str | None:
    r"""Return what the last `\boxed{}` or `\fbox{}` holds; None where there is none."""
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        return None
    bare = re.match(r"\\boxed ([^${]+)", solution[start:])
    if bare:
        return bare[1].strip()
    begin, depth = solution.find("{", start), 0
    for end in range(begin, len(solution)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[begin + 1 : end]
    return None


def marked_answer(text: str) -> str | None:
    """Return what follows the last `The answer is: `, up to the sentence's end; None without it.

    Source: arXiv:2309.12284 (MetaMath), evaluation.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER)
    return tail.split(".\n")[0].strip().removesuffix(".").strip() if marker else None


def hendrycks_equal(answer: str, gold: str) -> bool:
    """Compare two answers as normalised strings. Source: arXiv:2103.03874 (MATH)."""
    return _normalised(answer) == _normalised(gold)


def symbolically_equal(answer: str, gold: str) -> bool:
    """Compare two answers by math-verify, which reads LaTeX into expressions."""
    from math_verify import parse, verify

    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


def _normalised(text: str) -> str:
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip()
