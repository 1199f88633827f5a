"""The clients' examples: read, tokenized, counted, dealt out, and some of each held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import Config
from fedex_scale.config.words import named
from fedex_scale.data.batching import Examples, concatenate
from fedex_scale.data.chat import template_of
from fedex_scale.data.encode import NothingLeft, encode
from fedex_scale.data.holdout import AUTO_SHARE, by_default, hold_out
from fedex_scale.data.partition import describe, split
from fedex_scale.data.prompts import schema_of
from fedex_scale.data.sources import Pool, load_pool, load_sites, read_held_out
from fedex_scale.data.turns import TURN_KEYS
from fedex_scale.methods.all import METHODS
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed

LISTED = 8  # clients named in a line


@dataclass(frozen=True, kw_only=True)
class Clients:
    """Who trains on what.

    Fields:
        train: each client's examples.
        held_out: what nobody trains on, by the client that has it, or by its file.
        names: each client's, for a person.
        schema: what a row is.
        report: what partition.json says of them.
        notes: what to tell at the start, a line each.
    """

    train: list[Examples]
    held_out: dict[str, Examples]
    names: list[str]
    schema: str
    report: dict[str, Any]
    notes: list[str]


def read_clients(config: Config, tokenizer: PreTrainedTokenizerBase) -> Clients:
    """Return each client's examples.

    Raises:
        UserError: data that cannot be used, or of which too much would be left out.
    """
    if config.partition.kind == "sites":
        pools = load_sites(config.data, config.partition)
    else:
        pools = [load_pool(config.data, derive_seed(config.run.seed, "rows"))]
    encoded = [_encode(pool, config, tokenizer) for pool in pools]
    examples = concatenate(encoded)
    left_out = [_told_of_rows("data", examples, config)]
    rows = [pool.rows.select(own.rows) for pool, own in zip(pools, encoded, strict=True)]
    parts, names = _deal(rows, pools, config)
    trained, held = hold_out(parts, names, config)
    report = _described(rows, trained, held, names, config)
    report |= {"schema": pools[0].schema, **count_rows(examples), "sha256": digest_of(examples)}
    if config.data.chat_template:
        report["chat_template"] = template_of(config.data.chat_template, tokenizer)
    held_out = {name: examples.select(part) for name, part in zip(names, held, strict=True) if part}
    if isinstance(config.data.holdout, str) and config.data.holdout != "auto":
        files = [file for pool in pools for file in pool.files]
        held_pool = read_held_out(config.data.holdout, pools[0], config.data, files)
        apart = _encode(held_pool, config, tokenizer)
        held_out = {Path(config.data.holdout).name: apart}
        left_out.append(_told_of_rows("data.holdout", apart, config))
        report["held_out"] = {**count_rows(apart), "sha256": digest_of(apart)}
    sizes = dict(zip(names, map(len, trained), strict=True))
    told = [
        _recognised(pools, config),
        _not_used(pools, config),
        *left_out,
        _dealt_out(pools, sizes, config),
    ]
    if METHODS[config.method.name].one_client:
        trained = [sorted(index for part in trained for index in part)]
    return Clients(
        train=[examples.select(part) for part in trained],
        held_out=held_out,
        names=names,
        schema=pools[0].schema,
        report=report,
        notes=[note for note in (*told, _told_of_held_out(held_out, sizes, config)) if note],
    )


def count_rows(examples: Examples) -> dict[str, int]:
    """Return how many rows there were, what became of those that are not whole, and the longest."""
    left_out = {"empty": examples.num_empty, "dropped": examples.num_dropped}
    return {
        "rows": len(examples) + sum(left_out.values()),
        **left_out,
        "truncated": examples.num_truncated,
        "longest": examples.longest,
    }


def digest_of(examples: Examples) -> str:
    """Return the SHA-256 of the tokens: other data, or another tokenizer, is another run."""
    digest = hashlib.sha256()
    for array in (examples.tokens, examples.lengths, examples.prompt_lengths, examples.trained):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _encode(pool: Pool, config: Config, tokenizer: PreTrainedTokenizerBase) -> Examples:
    schema = schema_of(config.data, pool.schema, pool.rows.column_names)
    length = config.data.max_length
    try:
        return encode(pool.rows, schema, tokenizer, max_length=length, place=pool.place)
    except NothingLeft as error:
        raise UserError(f"{named(pool.source)}: {error}") from None


def _deal(
    rows: Sequence[Dataset], pools: Sequence[Pool], config: Config
) -> tuple[list[list[int]], list[str]]:
    """Return each client's examples, as numbers over all pools, and its name."""
    if config.partition.kind == "sites":
        begins = np.cumsum([0, *map(len, rows)]).tolist()
        parts = [list(range(begin, end)) for begin, end in pairwise(begins)]
        return parts, [str(pool.site) for pool in pools]
    parts = split(rows[0], config.partition, derive_seed(config.run.seed, "partition"))
    return parts, [f"client {client}" for client in range(len(parts))]


def _described(
    rows: Sequence[Dataset],
    trained: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    names: Sequence[str],
    config: Config,
) -> dict[str, Any]:
    """Return what partition.json says of each client."""
    if config.partition.kind != "sites":
        report = describe(trained, rows[0], config.partition.column)
    else:
        begins = np.cumsum([0, *map(len, rows)])
        report = {"clients": []}
        for client, (name, own, part) in enumerate(zip(names, rows, trained, strict=True)):
            local = (np.array(part) - begins[client]).tolist()
            (entry,) = describe([local], own)["clients"]
            report["clients"].append(entry | {"client": client, "name": name})
    for entry, part in zip(report["clients"], held, strict=True):
        if part:
            entry["held_out"] = len(part)
    return report


def _recognised(pools: Sequence[Pool], config: Config) -> str | None:
    if config.data.schema != "auto":
        return None
    schema = schema_of(config.data, pools[0].schema, pools[0].rows.column_names)
    columns = [x for x in schema.used if x in pools[0].rows.column_names]
    others = f" (and so are {len(pools) - 1} more)" if len(pools) > 1 else ""
    return (
        f"data: {named(pools[0].source)} is {pools[0].schema} ({', '.join(columns)}), as its "
        f"columns say{others}; set data.schema if it is another"
    )


def _not_used(pools: Sequence[Pool], config: Config) -> str | None:
    """Return a line on columns that nobody looks at."""
    names = {x: None for pool in pools for x in pool.rows.column_names}
    schema = schema_of(config.data, pools[0].schema, tuple(names))
    left = [named(x) for x in names if x not in (*schema.used, config.partition.column)]
    if schema.turns:
        keys = {key: None for pool in pools for key in _keys_of_turns(pool, schema.turns)}
        left += [named(f"{schema.turns}.{key}") for key in keys if key not in TURN_KEYS]
    if not left:
        return None
    more = f" and {len(left) - LISTED} more" if len(left) > LISTED else ""
    return f"data: not used of its columns: {', '.join(left[:LISTED])}{more}"


def _keys_of_turns(pool: Pool, column: str) -> Iterable[str]:
    """Return the keys that a chat's turns have; turns that are none are told of later."""
    if column not in pool.rows.features:
        return ()
    turn = getattr(pool.rows.features[column], "feature", None)
    if isinstance(turn, dict):
        return turn
    turns = (turn for chat in pool.rows[column] if isinstance(chat, list) for turn in chat)
    return dict.fromkeys(key for turn in turns if isinstance(turn, dict) for key in turn)


def _told_of_rows(key: str, examples: Examples, config: Config) -> str | None:
    """Return a line on the rows that are not trained, or looked at, whole.

    Args:
        key: the setting that names them.

    Raises:
        UserError: they are more than the config allows.
    """
    counts, length = count_rows(examples), config.data.max_length
    parts = {
        "empty": counts["empty"],
        f"with no room for a response in data.max_length={length}": counts["dropped"],
        f"cut there, so that their end is not learned (the longest has {counts['longest']} "
        "tokens)": counts["truncated"],
    }
    number = sum(parts.values())
    if not number:
        return None
    listed = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    line = f"{key}: {number} of {counts['rows']} rows are left out or cut: {listed}"
    remedies = [f"data.max_length={counts['longest']} holds all"] * (number > counts["empty"])
    share = number / counts["rows"]
    if share <= config.data.max_dropped:
        return "; ".join([line, *remedies])
    remedies.append(f"data.max_dropped={min(0.99, math.ceil(100 * share) / 100):g} goes on so")
    raise UserError(
        f"{line}; expected at most data.max_dropped={config.data.max_dropped:g} of them; "
        f"{', or '.join(remedies)}"
    )


def _dealt_out(pools: Sequence[Pool], sizes: Mapping[str, int], config: Config) -> str | None:
    """Return a line on whose the files are, where there are several."""
    if config.partition.kind == "sites":
        listed = [f"{named(name)} {size}" for name, size in sizes.items()][:LISTED]
        more = f", and {len(sizes) - LISTED} more" if len(sizes) > LISTED else ""
        return f"clients, with their examples: {', '.join(listed)}{more}"
    files = pools[0].files
    if len(files) < 2:
        return None
    return (
        f"data: {len(files)} files are pooled, and their rows dealt out anew "
        f"(partition.kind={config.partition.kind}); for a client a file, set partition.kind=sites "
        f"and partition.files={named(pools[0].source)} in place of data.path"
    )


def _told_of_held_out(
    held_out: Mapping[str, Examples], sizes: Mapping[str, int], config: Config
) -> str | None:
    number = sum(map(len, held_out.values()))
    if number:
        return (
            f"held out: {number} examples are not trained; their loss is told "
            f"(data.holdout={config.data.holdout}; 0 trains on all)"
        )
    if not by_default(config):
        return None
    steps = config.train.max_steps
    got = f"the largest has {max(sizes.values())}" + (
        f" and a round {steps * config.train.batch_size}" if steps is not None else ""
    )
    return (
        f"held out: none, as that takes a client of {AUTO_SHARE} examples a round, and {got}; set "
        "data.holdout=0.1, or to a file of such rows, to be told their loss"
    )
