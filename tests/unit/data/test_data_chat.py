"""Chats: the assistant's tokens, and no others, are trained, whatever the template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import chat_templates as published
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedex_scale.data.chat import ChatEncoder, render
from fedex_scale.data.prompts import Schema

SMOLLM2 = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"
CHAT = Schema(None, "", turns="messages", as_chat=True)
NUM_CHATS = 200


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    match name:
        case "smollm2":
            return AutoTokenizer.from_pretrained(SMOLLM2)
        case "smollm2_small":
            return published.byte_level(["<|im_start|>", "<|im_end|>"])
        case "llama32":
            return published.byte_level(published.SPECIAL["llama"])
        case "gemma2":
            return published.metaspace(published.SPECIAL["gemma"], "never")
        case "mistral":
            return published.metaspace(published.SPECIAL["mistral"], "first")
    raise AssertionError(name)


CASES = {
    "smollm2": (published.SMOLLM2, published.smollm2),
    "smollm2_small": (published.SMOLLM2, published.smollm2),
    "llama32": (published.LLAMA32, published.llama32),
    "gemma2": (published.GEMMA2, published.gemma2),
    "mistral": (published.MISTRAL, published.mistral),
}


def by_hand(
    segments: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Return tokens and mask by tokenizing all that stands before each begin and end anew."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ends = list(accumulate(len(text) for text, _ in segments))
    text = "".join(text for text, _ in segments)
    spans = [
        (end - len(part), end)
        for end, (part, trained) in zip(ends, segments, strict=True)
        if trained
    ]
    ids = tokens(text)
    if all(ids[: len(tokens(text[:begin]))] == tokens(text[:begin]) for begin, _ in spans):
        mask = [False] * len(ids)
        for begin, end in spans:
            for i in range(len(tokens(text[:begin])), len(tokens(text[:end]))):
                mask[i] = True
        return ids, mask
    ids, mask = [], []
    for begin, end in pairwise([0, *(begin for begin, _ in spans), len(text)]):
        piece = tokens(text[begin:end])
        stop = next((stop for start, stop in spans if start == begin), begin)
        trained = len(tokens(text[begin:stop]))
        ids += piece
        mask += [True] * trained + [False] * (len(piece) - trained)
    return ids, mask


@pytest.mark.parametrize("name", CASES)
def test_the_masks_are_those_made_by_hand_from_the_templates_text(name: str) -> None:
    if name == "smollm2" and not SMOLLM2.is_dir():
        pytest.skip("its tokenizer is not here")
    tokenizer, (template, segments_of) = tokenizer_of(name), CASES[name]
    chats, draw = ChatEncoder(template, tokenizer), random.Random(name)
    trained = 0
    for _ in range(NUM_CHATS):
        turns = published.conversation(draw, system=name in ("smollm2", "llama32"))
        segments = segments_of(turns)
        assert render(turns, template, tokenizer, ask=False) == "".join(x for x, _ in segments)
        expected = by_hand(segments, tokenizer)
        assert chats.encode(turns) == expected, turns
        trained += sum(expected[1])
    assert trained > 10 * NUM_CHATS
