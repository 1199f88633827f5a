"""Which examples make a step, how ranks share them, and the tensors of one micro-batch.

Every rank computes the same plan from the lengths and the seed, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

MASKED = -100  # a label that takes no part in the loss
BATCHES_PER_CHUNK = 50  # within which grouping by length sorts


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenized examples in flat arrays; a selection shares the tokens with the whole."""

    tokens: np.ndarray
    """All examples' tokens, one after another: int32."""
    starts: np.ndarray
    """Where each example begins in `tokens`."""
    lengths: np.ndarray
    """Tokens of each example."""
    prompt_lengths: np.ndarray
    """Tokens of each example before the first that is trained."""
    rows: np.ndarray
    """The row that each example was made from."""
    trained: np.ndarray | None = None
    """Which of `tokens` are trained: bool; none: all after the prompt."""
    num_truncated: int = 0
    """Rows cut to the maximum length."""
    num_dropped: int = 0
    """Rows left out, as none of their tokens within the maximum length would be trained."""
    num_empty: int = 0
    """Rows left out, as they hold no prompt or no response."""
    longest: int = 0
    """Tokens of the longest row, before it is cut."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_trained(self) -> np.ndarray:
        """Tokens of each example that are trained: its responses and their end tokens."""
        if self.trained is None:
            return self.lengths - self.prompt_lengths
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return before[self.starts + self.lengths] - before[self.starts]

    def select(self, indices: Sequence[int]) -> Examples:
        """Return these examples only. The counts remain those of the whole."""
        indices = np.asarray(indices, dtype=np.int64)
        fields = ("starts", "lengths", "prompt_lengths", "rows")
        return replace(self, **{name: getattr(self, name)[indices] for name in fields})

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return one example's input_ids and labels."""
        start, length = self.starts[index], self.lengths[index]
        tokens = self.tokens[start : start + length].tolist()
        prompt = self.prompt_lengths[index]
        labels = [MASKED] * prompt + tokens[prompt:]
        if self.trained is not None:
            labels = np.where(self.trained[start : start + length], tokens, MASKED).tolist()
        return {"input_ids": tokens, "labels": labels}


def concatenate(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all parts, one after another; rows are numbered on."""
    if len(parts) == 1:
        return parts[0]
    in_turns = any(part.trained is not None for part in parts)
    tokens = np.cumsum([0, *(len(part.tokens) for part in parts)])
    rows = np.cumsum([0, *(len(p) + p.num_dropped + p.num_empty for p in parts)])
    return Examples(
        tokens=np.concatenate([part.tokens for part in parts]),
        starts=np.concatenate([x.starts + at for x, at in zip(parts, tokens, strict=False)]),
        lengths=np.concatenate([part.lengths for part in parts]),
        prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
        rows=np.concatenate([x.rows + at for x, at in zip(parts, rows, strict=False)]),
        trained=np.concatenate([_trained(part) for part in parts]) if in_turns else None,
        num_truncated=sum(part.num_truncated for part in parts),
        num_dropped=sum(part.num_dropped for part in parts),
        num_empty=sum(part.num_empty for part in parts),
        longest=max(part.longest for part in parts),
    )


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    group_by_length: bool = False,
) -> list[list[int]]:
    """Return the examples of each optimizer step, over all ranks: every one once an epoch.

    Grouping sorts by length within chunks of 50 batches of the epoch's permutation and shuffles
    the batches, so that little is padded and the order still is random in the large. An epoch has
    one batch that is not full where its examples do not divide.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    lengths = np.asarray(lengths)
    steps = []
    for _ in range(epochs):
        order = draw.permutation(len(lengths))
        if group_by_length:
            order = _sort_in_chunks(order, lengths, BATCHES_PER_CHUNK * batch_size)
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
        if group_by_length:
            batches = [batches[i] for i in draw.permutation(len(batches))]
        steps += batches
    return steps


def shard(
    step: Sequence[int], *, rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """Return this rank's micro-batches of a step: as many on every rank, of at most the size.

    Ranks get as many examples as each other, or one more; taken in turns, so that long ones are
    spread where the step is sorted by length. A micro-batch may be empty: the rank then runs one
    without labels, as ranks that communicate in each forward pass must run as many.
    """
    most = -(-len(step) // world_size)
    num_micro_batches = -(-most // micro_batch_size)
    mine = step[rank::world_size]
    return [part.tolist() for part in np.array_split(np.array(mine, dtype=int), num_micro_batches)]


def shard_by_tokens(
    step: Sequence[int],
    lengths: Sequence[int],
    *,
    rank: int,
    world_size: int,
    max_tokens: int,
    packing: bool,
) -> list[list[int]]:
    """Return this rank's micro-batches of a step: as many on every rank, of at most so many tokens.

    Examples of like length share a micro-batch, so that little is padded; padding counts.

    Args:
        lengths: of all examples; none of more than `max_tokens`.
        packing: micro-batches are not padded.
    """
    order = sorted(step, key=lambda i: -lengths[i])
    shares = [
        list(_fill(order[first::world_size], lengths, max_tokens, packing))
        for first in range(world_size)
    ]
    most = max(map(len, shares))
    return shares[rank] + [[] for _ in range(most - len(shares[rank]))]


def _fill(
    order: Sequence[int], lengths: Sequence[int], max_tokens: int, packing: bool
) -> Iterator[list[int]]:
    """Yield examples, the longest first, in groups of at most so many tokens."""
    group: list[int] = []
    tokens = 0
    for i in order:
        longest = lengths[group[0]] if group else lengths[i]
        tokens = tokens + lengths[i] if packing else longest * (len(group) + 1)
        if tokens > max_tokens:
            yield group
            group, tokens = [], lengths[i]
        group.append(i)
    if group:
        yield group


def collate(
    examples: Examples, indices: Sequence[int], *, fallback: int, pad_id: int
) -> dict[str, Tensor]:
    """Return one micro-batch as int64 tensors (examples, longest), padded on the right.

    Padding is told by position and not by token, as the pad token may be the end token, which is
    trained.

    Args:
        fallback: the example to run with all labels masked where `indices` is empty.

    Returns:
        input_ids and labels. No mask of attention: a causal model's tokens do not see the padding
        behind them, and without a mask none has to be looked at before the step can start.
    """
    chosen = _chosen(examples, indices, fallback)
    shape = len(chosen), max(len(example["input_ids"]) for example in chosen)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, MASKED)
    for row, example in enumerate(chosen):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.tensor(example["input_ids"])
        labels[row, :length] = torch.tensor(example["labels"])
    return {"input_ids": input_ids, "labels": labels}


def pack(examples: Examples, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
    """Return one micro-batch as int64 tensors (1, tokens): its examples end to end, no padding.

    Each has positions of its own, from 0. Where there is no attention mask, transformers takes a
    position that does not follow the last one for the begin of another sequence, and lets neither
    see the other.

    Args:
        fallback: as in `collate`.

    Returns:
        input_ids, position_ids and labels.
    """
    chosen = _chosen(examples, indices, fallback)
    columns = {
        "input_ids": [example["input_ids"] for example in chosen],
        "position_ids": [range(len(example["input_ids"])) for example in chosen],
        # The end of one example must not be trained to tell the begin of the next.
        "labels": [[MASKED, *example["labels"][1:]] for example in chosen],
    }
    return {name: torch.tensor([list(chain(*parts))]) for name, parts in columns.items()}


def _trained(examples: Examples) -> np.ndarray:
    """Return which of the tokens are trained."""
    if examples.trained is not None:
        return examples.trained
    lengths, prompts = examples.lengths, examples.prompt_lengths
    place = np.arange(len(examples.tokens)) - np.repeat(examples.starts, lengths)
    return place >= np.repeat(prompts, lengths)


def _chosen(examples: Examples, indices: Sequence[int], fallback: int) -> list[dict]:
    if len(indices):
        return [examples[i] for i in indices]
    example = examples[fallback]
    return [{**example, "labels": [MASKED] * len(example["labels"])}]


def _sort_in_chunks(order: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
