"""Who the clients are, and what becomes of what they trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fedex_scale.config.section import Count, Number, Positive, Section

MethodName = Literal["fedit", "fedex", "ffa", "flora", "flexlora", "lora_fair", "centralized"]


class PartitionConfig(Section, title="partition"):
    """How the rows are split over the clients."""

    kind: Literal["iid", "contiguous", "dirichlet", "natural"] = "iid"
    """Shuffled evenly; evenly in file order; uneven mixes of `column`; a client per value of it."""
    num_clients: Count = 3
    """Clients that the rows are split over."""
    column: str | None = None
    """For dirichlet and natural, such as type; also counted per client in partition.json."""
    alpha: Positive = 1.0
    """Dirichlet concentration: small gives clients of few kinds, large gives equal mixes."""
    min_examples: Count = 1
    """Dirichlet splits that leave a client fewer are drawn again."""

    def problems(self) -> Iterator[str]:
        if self.kind in ("dirichlet", "natural") and self.column is None:
            yield (
                f"partition.column: {self.kind} splits by a column, got none; name one of the data"
            )


class FederationSection(Section, title="federation"):
    """The rounds, and who takes part in them."""

    rounds: Count = 1
    """Rounds of train-and-aggregate."""
    client_fraction: Number = Field(1.0, gt=0, le=1)
    """Share of the clients that train in a round, drawn anew each round (at least one)."""
    init: Literal["shared", "per_client"] = "shared"
    """First A: one draw for all clients (the paper, eq. 10) or one a client (its public code)."""
    weights: Literal["num_examples", "uniform"] = "num_examples"
    """A client's weight in the averages."""
    on_client_failure: Literal["stop", "skip", "retry"] = "stop"
    """A client whose loss or adapter is NaN or Inf: stop the run, leave the client out of the
    round, or train it once more with another seed and stop if that fails, too."""


class MethodConfig(Section, title="method"):
    """Which method aggregates, and its settings."""

    name: MethodName = "fedex"
    """fedit, fedex, ffa, flora, flexlora, lora_fair or centralized."""
    assign: Literal["average", "reinit", "keep", "svd"] = "average"
    """fedex: what clients start from: the mean pair, a fresh one, their own, or the rank-R SVD of
    the ideal update. What the pair lacks goes into the base."""
    svd_rank: Count | None = None
    """fedex with `assign: average`: send only the best part of this rank of each residual."""
    fair_lambda: Positive = 0.01
    """lora_fair: price of the norm of its change to B."""

    def problems(self) -> Iterator[str]:
        if self.assign != "average" and self.name != "fedex":
            yield (
                f"method.assign: {self.assign} needs method.name fedex, got {self.name}; "
                "drop method.assign"
            )
        if self.svd_rank is not None and (self.name, self.assign) != ("fedex", "average"):
            yield (
                f"method.svd_rank: needs method.name fedex and method.assign average, got "
                f"{self.name} and {self.assign}; drop method.svd_rank"
            )


class AggregateSection(Section, title="aggregate"):
    """Where the part of the update that the adapter cannot hold goes."""

    fold: Literal["side", "carry", "round"] = "side"
    """side: a second frozen adapter; carry: the base, with what rounding loses kept for the next
    fold; round: the base, rounded at every fold, as published."""
    side_rank: Count | None = None
    """Rank of the side adapter; none: one round's (K-1)R, at most 128."""
    clip_update_norm: Positive | None = None
    """Scale a client's change of the adapter down to this norm, over all factors; none: never."""
    reject_update_norm: Positive | None = None
    """Leave a client out of the round whose change has a larger norm than this; none: never."""
