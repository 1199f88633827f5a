"""Prompts and answer rules of the mathematics tasks. Source: arXiv:2309.12284 (MetaMath).

A filter reads the answer out of a generation, so that lm-eval's samples show it; a score compares
it with the row's. A row whose own answer cannot be read counts as wrong, and is counted.
"""

from collections.abc import Callable, Iterable
from fractions import Fraction

from fedex_scale.data.answers import correct_number, gold_number, paper_number
from fedex_scale.data.latex import (
    hendrycks_equal,
    last_boxed,
    marked_answer,
    paper_boxed,
    symbolically_equal,
)
from fedex_scale.data.prompts import MATH_EVALUATION_PROMPT, MATH_PROMPT
from fedex_scale.runtime.errors import UserError

Responses = Iterable[list[str]]
NO_ANSWER = "[invalid]"  # as lm-eval's own filters say it


def word_problem_prompt(row: dict) -> str:
    return MATH_PROMPT.format(instruction=row["query"])


def word_problem_gold(row: dict) -> str | None:
    return _text(correct_number(row["response"]))


def gsm8k_prompt(row: dict) -> str:
    return MATH_EVALUATION_PROMPT.format(instruction=row["question"])


def gsm8k_gold(row: dict) -> str | None:
    try:
        return _text(gold_number(row["answer"]))
    except UserError:
        return None


def math_prompt(row: dict) -> str:
    return MATH_EVALUATION_PROMPT.format(instruction=row["problem"])


def math_gold(row: dict) -> str | None:
    return last_boxed(row["solution"])


def by_paper_rule(responses: Responses, rows: list[dict]) -> list[str]:
    return _first(responses, paper_number)


def by_correct_rule(responses: Responses, rows: list[dict]) -> list[str]:
    return _first(responses, correct_number)


def after_marker(responses: Responses, rows: list[dict]) -> list[str]:
    return _first(responses, marked_answer)


def score_word_problem(row: dict, answers: list[str]) -> dict[str, float]:
    return _equal(answers[0], word_problem_gold(row))


def score_gsm8k(row: dict, answers: list[str]) -> dict[str, float]:
    return _equal(answers[0], gsm8k_gold(row))


def score_math(row: dict, answers: list[str]) -> dict[str, float]:
    """exact_match is the papers' rule, math_verify the symbolic one."""
    answer, gold, by_paper = answers[0], math_gold(row), paper_boxed(row["solution"])
    return {
        "exact_match": float(_holds(hendrycks_equal, answer, by_paper)),
        "math_verify": float(_holds(symbolically_equal, answer, gold)),
        "unparsed_gold": int(gold is None),
    }


def _holds(rule: Callable[[str, str], bool], answer: str, gold: str | None) -> bool:
    return answer != NO_ANSWER and gold is not None and rule(answer, gold)


def _equal(answer: str, gold: str | None) -> dict[str, float]:
    return {
        "exact_match": float(gold is not None and answer == gold),
        "unparsed_gold": int(gold is None),
    }


def _first(responses: Responses, rule: Callable[[str], object]) -> list[str]:
    read = [_text(rule(outputs[0])) for outputs in responses]
    return [NO_ANSWER if answer is None else answer for answer in read]


def _text(value: str | int | Fraction | None) -> str | None:
    return None if value is None else str(value)
