from __future__ import annotations

from fractions import Fraction

import pytest

from fedex_scale.data.answers import correct_number, gold_number, paper_number
from fedex_scale.runtime.errors import UserError


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
        ("1,2", 12, None),
        ("12,34,567", 1234, None),
        ("1.234.567", 1, None),
        ("10:30", 10, None),
        ("1e3", 1, None),
        ("5\u00b2", 5, None),
        ("3.6", 4, Fraction(18, 5)),
        ("2.5", 2, Fraction(5, 2)),
        (".5", 0, Fraction(1, 2)),
        ("1/2", 0, Fraction(1, 2)),
        ("-7/2", -4, Fraction(-7, 2)),
        ("1,200/3", 1200, 400),
        ("2 1/2", 2, Fraction(5, 2)),
        ("5/0", 5, None),
        ("-5/0", -5, None),
        ("5/00", None, None),
        ("/5", None, None),
        (r"\frac{3}{4}", 3, Fraction(3, 4)),
        (r"$-\dfrac34$", 34, Fraction(-3, 4)),
        (r"2\frac{1}{2}", 2, Fraction(5, 2)),
        (r"\frac{1}{0}", 1, None),
        (r"\sqrt{16}", 16, None),
        (r"5\pi", 5, None),
        (r"\boxed{1{,}234 \text{ cm}}", 1, 1234),
        ("3 + 4 = 7", 3, 7),
        ("3 apples + 4 apples = 7 apples", 3, 7),
        (r"5 \times 3 = 15", 5, 15),
        ("7 = 3 + 4", 7, 7),
        ("3 - 5 = -2", 3, -2),
        ("3 + 4", 3, None),
        ("2^3", 2, None),
        ("7 cm^2", 7, 7),
        ("20-30", 20, None),
        ("x - 5", 5, None),
        ("x = 40 apples, not 50", 40, 40),
        ("5, because 2 + 4 = 6", 5, 5),
        ("5. Check: 2 + 4 = 6", 5, 5),
        ("approx. 5 dollars", 5, 5),
        ("\n5\n2 + 4 = 6", 5, 5),
        ("unclear\n5", 5, None),
        ("20%", 20, 20),
        ("90071992547409931.5", 90071992547409936, Fraction(180143985094819863, 2)),
        pytest.param("9" * 5000, None, None, id="endless"),
        pytest.param("-" + "9" * 5000, None, None, id="endless below zero"),
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
