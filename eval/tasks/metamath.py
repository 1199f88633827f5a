"""Prompt and answer rule for rows of MetaMathQA's schema (query, response)."""

from fedex_scale.data.answers import correct_number
from fedex_scale.data.prompts import MATH_PROMPT


def prompt(row: dict) -> str:
    return MATH_PROMPT.format(instruction=row["query"])


def score(row: dict, outputs: list[str]) -> dict[str, float]:
    """A generation counts if the number after its last `The answer is:` is the row's."""
    given, gold = correct_number(outputs[0]), correct_number(row["response"])
    return {"exact_match": float(given is not None and given == gold)}
