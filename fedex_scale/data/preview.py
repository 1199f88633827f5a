"""What a model would be trained on, for a person to look at: examples, lengths, shares."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.config.words import named
from fedex_scale.data.batching import MASKED, Examples
from fedex_scale.data.clients import Clients

TRAINED = "bold green"
MARKS = "⟦", "⟧"  # around what is trained, where there is no colour
LISTED = 20  # clients with a line each


def show(
    clients: Clients,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    *,
    color: bool,
) -> Iterator[Text | Table | str]:
    """Yield what to print: the notes, each client's share, lengths, and the first examples.

    Args:
        number: of examples.
        color: what is trained is told by its colour, and by marks otherwise.
    """
    yield from clients.notes
    counts = clients.report
    yield (
        f"{counts['rows']} rows of schema {clients.schema}: {counts['empty']} empty, "
        f"{counts['dropped']} without room for a response, {counts['truncated']} cut at "
        f"data.max_length={config.data.max_length}; the longest has {counts['longest']} tokens"
    )
    yield _table(clients)
    told = f"coloured {TRAINED.split()[-1]}" if color else f"in {MARKS[0]} {MARKS[1]}"
    for client, index in _first(clients.train, number):
        examples = clients.train[client]
        length, trained = examples.lengths[index], examples.num_trained[index]
        yield (
            f"\n{named(clients.names[client])}, example {index + 1}: {length} tokens, of which "
            f"{trained} are trained, {told}"
        )
        yield decoded(examples[index], tokenizer, color=color)


def decoded(
    example: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, *, color: bool
) -> Text:
    """Return an example's text, as its tokens have it, with what is trained told apart."""
    ids, trained = example["input_ids"], [label != MASKED for label in example["labels"]]
    text, begin = Text(), 0
    while begin < len(ids):
        end = begin
        while end < len(ids) and trained[end] == trained[begin]:
            end += 1
        # Of the tokens from the first one, as a word's space is lost at the begin of a text.
        before = tokenizer.decode(ids[:begin])
        piece = _plain(tokenizer.decode(ids[:end])[len(before) :])
        if trained[begin] and not color:
            piece = f"{MARKS[0]}{piece}{MARKS[1]}"
        text.append(piece, style=TRAINED if trained[begin] and color else "")
        begin = end
    return text


def _table(clients: Clients) -> Table:
    """Return each client's share of the examples, and how long they are."""
    table = Table(box=None, pad_edge=False)
    table.add_column("client")
    for column in ("examples", "share", "held out", "tokens: least", "median", "most", "trained"):
        table.add_column(column, justify="right")
    total = sum(map(len, clients.train))
    apart = bool(clients.held_out) and not set(clients.held_out) & set(clients.names)
    for client, examples in enumerate(clients.train[:LISTED]):
        lengths, name = examples.lengths, clients.names[client]
        held = len(clients.held_out.get(name, ()))
        if len(clients.train) < len(clients.names):
            name, held = "all clients", sum(map(len, clients.held_out.values()))
        table.add_row(
            named(name),
            f"{len(examples):,}",
            f"{len(examples) / total:.1%}",
            "a file" if apart else f"{held:,}",
            str(lengths.min()),
            f"{np.median(lengths):g}",
            str(lengths.max()),
            f"{examples.num_trained.sum() / lengths.sum():.0%}",
        )
    if len(clients.train) > LISTED:
        table.add_row(f"and {len(clients.train) - LISTED} more")
    return table


def _first(clients: list[Examples], number: int) -> list[tuple[int, int]]:
    """Return the first examples, of each client in turn."""
    most = max(map(len, clients))
    turns = ((k, i) for i in range(most) for k in range(len(clients)) if i < len(clients[k]))
    return [found for _, found in zip(range(number), turns, strict=False)]


def _plain(text: str) -> str:
    """Return text in which nothing tells a terminal what to do."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
