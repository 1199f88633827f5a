"""Which client has which rows: a function of the rows, the config and the seed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from fedex_scale.config.federation import PartitionConfig
from fedex_scale.runtime.errors import UserError

MAX_REDRAWS = 100  # of a Dirichlet split that leaves a client too little


def split(rows: Dataset, config: PartitionConfig, seed: int) -> list[list[int]]:
    """Return each client's row indices; every row has exactly one client.

    Raises:
        UserError: more clients than rows, no such column, a client left empty, or not as many
            clients as the column has values (natural).
    """
    if config.num_clients > len(rows):
        raise UserError(
            f"partition.num_clients: expected at most one per example ({len(rows)}), "
            f"got {config.num_clients}; use fewer clients or more data"
        )
    if config.column is not None:
        _check_column(rows, config.column)
    draw = np.random.Generator(np.random.PCG64(seed))
    match config.kind:
        case "iid":
            parts = np.array_split(draw.permutation(len(rows)), config.num_clients)
        case "contiguous":
            parts = np.array_split(np.arange(len(rows)), config.num_clients)
        case "dirichlet":
            parts = _dirichlet(_rows_by_value(rows, config.column), config, draw)
        case "dirichlet_per_client":
            parts = _dirichlet_per_client(_rows_by_value(rows, config.column), config, draw)
        case "natural":
            parts = _natural(_rows_by_value(rows, config.column), config)
    return [part.tolist() for part in parts]


def describe(parts: Sequence[Sequence[int]], rows: Dataset, column: str | None = None) -> dict:
    """Return what partition.json holds: per client the size, a hash of its rows, and counts.

    The hash is SHA-256 over the rows' JSON, one a line, in the client's order.

    Args:
        column: whose values are counted; none: no counts.
    """
    return {"clients": [_describe(k, rows.select(part), column) for k, part in enumerate(parts)]}


def _dirichlet(
    groups: dict[Any, np.ndarray], config: PartitionConfig, draw: np.random.Generator
) -> list[np.ndarray]:
    """Split each value's rows by shares over the clients, drawn from Dirichlet(alpha, ..., alpha).

    Sizes differ, too. Source: Yurochkin et al., arXiv:1905.12022; drawn again for a smallest size
    as in Li et al., arXiv:2102.02079.
    """
    for _ in range(MAX_REDRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(config.num_clients)]
        for group in groups.values():
            shares = draw.dirichlet([config.alpha] * config.num_clients)
            cuts = np.rint(np.cumsum(shares)[:-1] * len(group)).astype(int)
            for part, piece in zip(parts, np.split(draw.permutation(group), cuts), strict=True):
                part.append(piece)
        merged = [np.concatenate(part) for part in parts]
        if min(map(len, merged)) >= config.min_examples:
            return merged
    raise UserError(
        f"partition: expected at least {config.min_examples} examples for each of "
        f"{config.num_clients} clients, got {min(map(len, merged))} in the last of {MAX_REDRAWS} "
        f"Dirichlet({config.alpha}) draws; raise partition.alpha or use fewer clients"
    )


def _dirichlet_per_client(
    groups: dict[Any, np.ndarray], config: PartitionConfig, draw: np.random.Generator
) -> list[np.ndarray]:
    """Fill clients of one size by mixes of values, each drawn from Dirichlet(alpha * all's shares).

    Rows are not put back, so that the last clients take what values are left.
    Source: Hsu et al., arXiv:1909.06335.
    """
    shuffled = [draw.permutation(group) for group in groups.values()]
    left = np.array([len(group) for group in shuffled])
    concentration = np.maximum(config.alpha * (left / left.sum()), np.finfo(float).tiny)
    sizes = [len(part) for part in np.array_split(np.arange(left.sum()), config.num_clients)]
    parts = []
    for size in sizes:
        taken = _take(size, draw.dirichlet(concentration), left, draw)
        left = left - taken
        pieces = zip(shuffled, left, taken, strict=True)
        parts.append(np.concatenate([group[i : i + n] for group, i, n in pieces]))
    return parts


def _take(size: int, mix: np.ndarray, left: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return how many rows of each value a client of `size` gets out of those that are left.

    What is missing of a value that has run out is drawn from the mix of the others.
    """
    taken = np.zeros_like(left)
    while (missing := size - taken.sum()) > 0:
        weights = np.where(taken < left, mix, 0.0)
        if not weights.any():  # the mix is of values that have run out
            weights = (left - taken).astype(float)
        drawn = draw.multinomial(missing, weights / weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


def _natural(groups: dict[Any, np.ndarray], config: PartitionConfig) -> list[np.ndarray]:
    if len(groups) != config.num_clients:
        raise UserError(
            f"partition.num_clients: natural has a client per value of {config.column} "
            f"({len(groups)}), got {config.num_clients}; set partition.num_clients={len(groups)}"
        )
    return list(groups.values())


def _check_column(rows: Dataset, column: str) -> None:
    plain = [name for name, kind in rows.features.items() if isinstance(kind, Value | ClassLabel)]
    if column not in plain:
        raise UserError(f"partition.column: expected one of {', '.join(plain)}, got {column}")


def _rows_by_value(rows: Dataset, column: str) -> dict[Any, np.ndarray]:
    """Return the row indices of each value of a column, by first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(rows[column]):
        groups.setdefault(value, []).append(index)
    return {value: np.array(indices) for value, indices in groups.items()}


def _describe(client: int, rows: Dataset, column: str | None) -> dict:
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(f"{line}\n".encode())
    entry = {"client": client, "num_examples": len(rows), "sha256": digest.hexdigest()}
    if column is not None:
        entry["counts"] = dict(sorted(Counter(map(str, rows[column])).items()))
    return entry
