"""Answers of MATH: read out of a solution or a generation, and compared.

Two rules, reported side by side: the published one, Hendrycks' equality of normalised strings, and
math-verify's symbolic equality.
"""

from __future__ import annotations

import re

from fedex_scale.data.answers import ANSWER_MARKER


def last_boxed(solution: str) -> str | None:
    r"""Return what the last `\boxed{}` or `\fbox{}` holds; None where there is none."""
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        return None
    bare = re.match(r"\\boxed ([^${]+)", solution[start:])
    return bare[1].strip() if bare else _braced(solution, solution.find("{", start))


def paper_boxed(solution: str) -> str | None:
    r"""Return the gold answer by the papers' rule, which reads neither `\fbox{7}` nor `\boxed 7`.

    Source: arXiv:2309.12284 (MetaMath), eval_math.py.
    """
    start = solution.rfind(r"\boxed")
    return _braced(solution, start + 6) if solution.startswith(r"\boxed{", start) else None


def marked_answer(text: str) -> str | None:
    """Return what follows the last `The answer is: `, up to the sentence's end; None without it.

    Source: arXiv:2309.12284 (MetaMath), evaluation.
    """
    _, marker, tail = text.rpartition(ANSWER_MARKER)
    return tail.split(".\n")[0].strip().removesuffix(".").strip() if marker else None


def hendrycks_equal(answer: str, gold: str) -> bool:
    r"""Compare two answers as normalised strings, by the papers' rule, quirks included.

    `50\%` is 50 and `50%` is not; where a step of the normalisation fails (two units, x/2, a bare
    `\sqrt`), the strings are compared as they are. lm-eval has the procedure as MetaMath used it.
    Source: arXiv:2103.03874 (MATH); arXiv:2309.12284 (MetaMath), util.py.
    """
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    return is_equiv(answer, gold)


def symbolically_equal(answer: str, gold: str) -> bool:
    """Compare two answers by math-verify, which reads LaTeX into expressions."""
    from math_verify import parse, verify

    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


def _braced(text: str, begin: int) -> str | None:
    """Return what stands between the brace at `begin` (-1: none) and the one that closes it."""
    depth = 0
    for end in range(begin, len(text)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin + 1 : end]
    return None
