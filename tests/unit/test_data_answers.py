from __future__ import annotations

from fractions import Fraction

import pytest

from fedex_scale.data.answers import (
    correct_number,
    gold_number,
    paper_number,
)
from fedex_scale.errors import UserError


@pytest.mark.parametrize(
    ("tail", "paper", "correct"),
    [
        ("72", 72, 72),
        ("72.", 72, 72),
        ("-5", -5, -5),
        ("+5", 5, 5),
        ("\u22125", 5, -5),
        ("-$5", 5, -5),
        ("$1,234", 1234, 1234),
        ("1,234,567", 1234, 1234567),
        ("12,345,678.5 dollars", 12345, Fraction(24691357, 2)),
        ("1,2", 12, 1),
        ("3.6", 4, Fraction(18, 5)),
        ("2.5", 2, Fraction(5, 2)),
        (".5", 0, Fraction(1, 2)),
        ("1/2", 0, Fraction(1, 2)),
        ("-7/2", -4, Fraction(-7, 2)),
        ("1,200/3", 1200, 400),
        ("5/0", None, None),
        ("/5", None, 5),
        ("x = 40 apples, not 50", 40, 40),
        ("20%", 20, 20),
        pytest.param("9" * 5000, None, None, id="endless"),
        ("", None, None),
        ("unknown", None, None),
    ],
)
def test_the_two_rules(tail: str, paper: int | None, correct: object):
    text = f"2 + 3 = 5.\nThe answer is: {tail}"
    assert paper_number(text) == paper
    assert correct_number(text) == correct


def test_the_last_marker_counts():
    text = "The answer is: 3 is wrong. The answer is: 4"
    assert paper_number(text) == correct_number(text) == 4


def test_no_marker_is_no_answer():
    for text in ("", "It is 72", "the answer is 72", "#### 72"):
        assert paper_number(text) is None
        assert correct_number(text) is None


def test_the_papers_rule_wants_the_space_after_the_marker():
    assert paper_number("The answer is:72") is None
    assert correct_number("The answer is:72") == 72


def test_gold_number():
    assert gold_number("2 + 3 = <<2+3=5>>5\n#### 5") == 5
    assert gold_number("so\n#### -1,234,567 ") == -1234567
    for answer in ("5", "#### five", ""):
        with pytest.raises(UserError, match="GSM8K"):
            gold_number(answer)
