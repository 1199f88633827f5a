"""From a row to the text that the model sees, and from the text to tokens with masked labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedex_scale.data.batching import Examples
from fedex_scale.data.chat import ChatEncoder, template_of
from fedex_scale.data.prompts import Schema
from fedex_scale.data.turns import Turns, tools_of, turns_of
from fedex_scale.runtime.errors import UserError

BATCH_ROWS = 1000  # tokenized at a time
MAX_CHARS = 1_000_000  # of one row's text; a tokenizer takes a gigabyte for five times as many

Encoded = tuple[int, list[int], Sequence[bool] | np.ndarray]
"""A row's index, its tokens, and which of them are trained."""


class NothingLeft(UserError):
    """No row can be trained on."""


def encode(
    rows: Iterable[dict[str, Any]],
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    place: Callable[[int], str] = lambda index: f"row {index + 1}",
) -> Examples:
    """Tokenize rows; of each, the response and the end token are trained, the prompt is not.

    Of a chat, the assistant's turns are trained; of plain text, all of it.

    An example of more than `max_length` tokens is cut there, and so has no end token: teaching a
    model to stop in the middle of an answer would be wrong. One of which no token is left to train
    is dropped, and so is a row whose prompt or response is empty. `Examples` counts them.

    Args:
        place: tells where the row of an index stands, for errors.

    Raises:
        UserError: the tokenizer has no end token, a row that cannot be used, or no example is left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer: expected one with an end token (eos), got none; set eos_token")
    pieces, masks, kept = [], [], []
    num_truncated = num_dropped = longest = 0
    counted = _Counted(rows)
    for index, tokens, trained in _encoded(counted, schema, tokenizer, place):
        longest = max(longest, len(tokens))
        mask = np.asarray(trained[:max_length], dtype=bool)
        if not mask.any():
            num_dropped += 1
            continue
        num_truncated += len(tokens) > max_length
        pieces.append(np.array(tokens[:max_length], dtype=np.int32))
        masks.append(mask)
        kept.append(index)
    if not kept and not num_dropped:
        raise NothingLeft("expected rows with a prompt and a response, got empty ones only")
    if not kept:
        raise NothingLeft(
            f"data.max_length: expected room for a prompt and some response, got {max_length}, "
            f"which no row fits; data.max_length={longest} holds all"
        )
    lengths = np.array([len(piece) for piece in pieces])
    prompt_lengths = np.array([int(mask.argmax()) for mask in masks])
    in_turns = any(not mask[mask.argmax() :].all() for mask in masks)
    return Examples(
        tokens=np.concatenate(pieces),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        rows=np.array(kept),
        trained=np.concatenate(masks) if in_turns else None,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_empty=counted.number - num_dropped - len(kept),
        longest=longest,
    )


def begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the begin token if the tokenizer puts one before every text, else nothing."""
    tokens = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if tokens[:1] == [tokenizer.bos_token_id] else []


class _Counted:
    """Rows, and how many were taken."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows, self.number = rows, 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, row in enumerate(self._rows):
            self.number = index + 1
            yield index, row


def _encoded(
    rows: Iterable[tuple[int, dict[str, Any]]],
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    place: Callable[[int], str],
) -> Iterator[Encoded]:
    """Yield each row that holds something, with the begin and end tokens."""
    if schema.as_chat:
        chats = ChatEncoder(template_of(schema.chat_template, tokenizer), tokenizer)

        def encoded(row: dict[str, Any]) -> tuple[list[int], list[bool]] | None:
            turns = _turns(row, schema)
            tools = tools_of(row) if schema.turns else None
            return turns and chats.encode(turns, tools)

        yield from ((index, *both) for index, both in _each(rows, encoded, place))
        return
    bos, eos = begin_tokens(tokenizer), tokenizer.eos_token_id
    for index, prompt, response in _tokenized(_each(rows, schema.texts, place), tokenizer):
        # Nothing tells the first token of a text without a prompt.
        known = max(1, len(bos) + len(prompt))
        tokens = [*bos, *prompt, *response, eos]
        yield index, tokens, np.arange(len(tokens)) >= known


def _each(
    rows: Iterable[tuple[int, dict[str, Any]]],
    take: Callable[[dict[str, Any]], Any],
    place: Callable[[int], str],
) -> Iterator[tuple[int, Any]]:
    """Yield what is taken of each row that holds something; errors say where the row stands."""
    for index, row in rows:
        try:
            _check_size(row)
            taken = take(row)
        except UserError as error:
            raise UserError(f"{place(index)}: {error}") from None
        if taken:
            yield index, taken


def _turns(row: dict[str, Any], schema: Schema) -> Turns | None:
    """Return a row's turns; none of an empty one."""
    if schema.turns:
        return turns_of(row, schema.turns)
    texts, roles = schema.texts(row), ("user", "assistant")
    return texts and [{"role": x, "content": y} for x, y in zip(roles, texts, strict=True)]


def _tokenized(
    texts_of: Iterable[tuple[int, tuple[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield each row's index, prompt tokens and response tokens, without special ones.

    Prompt and response are tokenized as one text, as published, and parted where the prompt's own
    tokens end: SentencePiece would put a space before a response of its own. Where a token would
    reach over the seam (Llama-3's `:$`), they are tokenized apart: generation goes on from the
    prompt's own tokens, so training must see the same.
    """
    held = iter(texts_of)
    while batch := list(islice(held, BATCH_ROWS)):
        prompts = [prompt for _, (prompt, _) in batch]
        texts = [*prompts, *(prompt + response for _, (prompt, response) in batch)]
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for (index, (_, response)), prompt, whole in zip(
            batch, tokens[: len(batch)], tokens[len(batch) :], strict=True
        ):
            if whole[: len(prompt)] == prompt:
                yield index, prompt, whole[len(prompt) :]
            else:
                yield index, prompt, tokenizer(response, add_special_tokens=False)["input_ids"]


def _check_size(row: dict[str, Any]) -> None:
    """Raise a UserError for a row of too much text."""
    num_chars = sum(
        len(value) if isinstance(value, str) else sum(len(str(part)) for part in value)
        for value in row.values()
        if isinstance(value, str | list)
    )
    if num_chars > MAX_CHARS:
        raise UserError(
            f"expected at most {MAX_CHARS:,} characters in a row, got {num_chars:,}; split it"
        )
