"""Answers of MATH: hard cases of reading and of comparing."""

from __future__ import annotations

import pytest

from fedex_scale.data.latex import (
    hendrycks_equal,
    last_boxed,
    marked_answer,
    paper_boxed,
    symbolically_equal,
)


@pytest.mark.parametrize(
    ("solution", "answer", "by_paper"),
    [
        (r"so $\boxed{5}$", "5", "5"),
        (r"$\boxed{1}$ but then $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed{\{1, {2}\}}", r"\{1, {2}\}", r"\{1, {2}\}"),
        (r"\fbox{x}", "x", None),
        (r"\boxed{1}, or \fbox{2}", "2", "1"),
        (r"is $\boxed 7$", "7", None),
        (r"\boxed{open", None, None),
        (r"\boxed", None, None),
        ("no box", None, None),
    ],
)
def test_the_gold_answer(solution: str, answer: str | None, by_paper: str | None) -> None:
    assert last_boxed(solution) == answer
    assert paper_boxed(solution) == by_paper


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x\nThe answer is: 5", "5"),
        ("The answer is: 1. The answer is: 2.", "2"),
        ("The answer is: 2.5.\nAnd more. The end.", "2.5"),
        ("The answer is:5", None),
        ("The answer is: ", ""),
        ("5", None),
    ],
)
def test_marked_answer(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal", "symbolic"),
    [
        (r"\frac12", r"\frac{1}{2}", True, True),
        (r"\dfrac{1}{2}", "1/2", True, True),
        (r"\frac1{72}", r"\tfrac{1}{72}", True, True),
        ("0.5", r"\frac{1}{2}", True, True),
        ("-1/2", r"-\frac{1}{2}", False, True),
        (".25", "0.25", True, True),
        ("k = 5", "5", True, True),
        (r"\sqrt3", r"\sqrt{3}", True, True),
        (r"90^\circ", "90", True, True),
        (r"50\%", "50", True, True),
        (r"\$12", "12", True, True),
        (r"7\text{ cm}", "7", True, True),
        (r"\left(1, 2\right)", "(1,2)", True, True),
        ("x+1", "1+x", False, True),
        (r"\frac{2}{4}", r"\frac{1}{2}", False, True),
        ("3", "4", False, False),
        ("-3", "3", False, False),
        ("", "3", False, False),
        ("50%", "50", False, True),
        ("50%", r"50\%", False, True),
        ("tfrac12", r"\frac12", False, False),
        ("dfrac12", "frac12", True, False),
        ("+1/2", "1/2", False, True),
        ("x/2", "x / 2", False, True),
        ("x / 2", "x / 2", True, True),
        (r"7\text{ cm}\text{ long}", r"7 \text{ cm}\text{ long}", False, True),
        (r"\sqrt", r"\sqrt ", False, True),
        ("xy = 5", "5", False, True),
        (".5", r"\frac12", True, True),
    ],
)
def test_two_answers(one: str, other: str, equal: bool, symbolic: bool) -> None:
    assert hendrycks_equal(one, other) == equal
    assert hendrycks_equal(other, one) == equal
    assert symbolically_equal(one, other) == symbolic
