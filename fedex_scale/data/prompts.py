"""From a row to the text that the model sees, and from the text to tokens with masked labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import add
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedex_scale.data.answers import ANSWER_MARKER, gold_number
from fedex_scale.data.batching import Examples
from fedex_scale.runtime.errors import UserError

_TASK = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n"
)
MATH_PROMPT = _TASK + "### Response:"
"""Training on MetaMathQA; the response follows without a space. Source: arXiv:2309.12284."""
MATH_EVALUATION_PROMPT = MATH_PROMPT + " Let's think step by step."
COMMONSENSE_PROMPT = _TASK + "### Response:\n"
"""Training and evaluation on Commonsense170K. Source: LLM-Adapters, arXiv:2304.01933."""
MATH_STOPS = ("Instruction:", "Instruction", "Response:", "Response")
"""Where generation stops in the evaluation of GSM8K and MATH, beside the end token."""

BATCH_ROWS = 1000  # tokenized at a time


@dataclass(frozen=True)
class Schema:
    """Where a row holds its instruction and its response, and the prompt around them."""

    instruction: str
    response: str
    prompt: str = MATH_PROMPT
    convert: Callable[[str], str] = str
    """Applied to the response."""


def encode(
    rows: Iterable[dict[str, Any]],
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> Examples:
    """Tokenize rows; of each, the response and the end token are trained, the prompt is not.

    An example of more than `max_length` tokens is cut there, and so has no end token: teaching a
    model to stop in the middle of an answer would be wrong. One whose prompt leaves no room for a
    token of the response is dropped. `Examples` counts both.

    Raises:
        UserError: the tokenizer has no end token, or no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected one with an end token (eos), got none; set eos_token")
    bos = begin_tokens(tokenizer)
    pieces, prompt_lengths, kept, num_truncated = [], [], [], 0
    for index, prompt, response in _tokenized(rows, schema, tokenizer):
        prompt = bos + prompt
        tokens = prompt + response + [tokenizer.eos_token_id]
        if len(prompt) >= max_length:
            continue
        num_truncated += len(tokens) > max_length
        pieces.append(np.array(tokens[:max_length], dtype=np.int32))
        prompt_lengths.append(len(prompt))
        kept.append(index)
    if not kept:
        raise UserError(
            f"data.max_length: expected room for a prompt and some response, got {max_length}, "
            "which no row fits; raise it or look at the rows"
        )
    lengths = np.array([len(piece) for piece in pieces])
    return Examples(
        tokens=np.concatenate(pieces),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=np.array(prompt_lengths),
        rows=np.array(kept),
        num_truncated=num_truncated,
        num_dropped=index + 1 - len(kept),
    )


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin token if the tokenizer puts one before every text, else nothing."""
    tokens = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if tokens[:1] == [tokenizer.bos_token_id] else []


def with_marker(answer: str) -> str:
    """Return a GSM8K answer in MetaMathQA's form: `... #### N`, then `The answer is: N`."""
    return f"{answer.rstrip()}\n{ANSWER_MARKER}{gold_number(answer)}"


def _tokenized(
    rows: Iterable[dict[str, Any]], schema: Schema, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each row's index, prompt tokens and response tokens, without special ones.

    Prompt and response are tokenized as one text, as published, and parted where the prompt's own
    tokens end: SentencePiece would put a space before a response of its own. Where a token would
    reach over the seam (Llama-3's `:$`), they are tokenized apart: generation goes on from the
    prompt's own tokens, so training must see the same.
    """
    numbered = enumerate(rows)
    while batch := list(islice(numbered, BATCH_ROWS)):
        prompts = [schema.prompt.format(instruction=row[schema.instruction]) for _, row in batch]
        responses = [schema.convert(str(row[schema.response])) for _, row in batch]
        texts = [*prompts, *map(add, prompts, responses)]
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for (index, _), response, prompt, whole in zip(
            batch, responses, tokens[: len(batch)], tokens[len(batch) :], strict=True
        ):
            if whole[: len(prompt)] == prompt:
                yield index, prompt, whole[len(prompt) :]
            else:
                yield index, prompt, tokenizer(response, add_special_tokens=False)["input_ids"]


SCHEMAS: dict[str, Schema] = {
    "metamath": Schema("query", "response"),
    "gsm8k": Schema("question", "answer", convert=with_marker),
    "commonsense": Schema("instruction", "output", prompt=COMMONSENSE_PROMPT),
}
"""`columns` has none: the config names its columns."""
