"""How many columns a method's base updates take, from counts alone."""

from __future__ import annotations

from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.methods.algebra import MAX_RANK

MAX_SIDE_RANK = 512
"""Columns of a run's side adapter by default; at 4096 x 4096 they cost a quarter of a layer."""


def base_update_rank(method: MethodConfig, num_clients: int, rank: int) -> int:
    """Return the columns that hold what a method adds to the base in one round, 0 for nothing.

    So many suffice for every layer; small layers may fill fewer.
    """
    if method.name not in ("fedex", "flora"):
        return 0
    if method.name == "flora" or method.assign == "reinit":
        return num_clients * rank
    lost = (num_clients - 1) * rank
    if method.assign == "svd" and is_streamed(num_clients, rank):
        return (num_clients + 1) * rank  # the ideal update, less its best part
    return lost if method.svd_rank is None else min(method.svd_rank, lost)


def is_streamed(num_clients: int, rank: int) -> bool:
    """Return whether a layer's clients are too many to be held in memory at once."""
    return num_clients > max(1, MAX_RANK // rank)


def side_rank_of(
    method: MethodConfig, section: AggregateSection, num_clients: int, rank: int, rounds: int
) -> int:
    """Return how many columns a run's side adapter may come to have, 0 for none.

    By default those of all rounds' base updates, at most 512.
    """
    most = base_update_rank(method, num_clients, rank)
    if section.fold != "side" or not most:
        return 0
    if section.side_rank != "auto":
        return section.side_rank
    return min(MAX_SIDE_RANK, rounds * most)
