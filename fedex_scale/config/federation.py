"""Who the clients are, and what becomes of what they trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedex_scale.config.section import (
    AsTuple,
    Count,
    Names,
    Number,
    Positive,
    Section,
    Share,
)
from fedex_scale.config.sites import find_sites
from fedex_scale.config.words import shown

MethodName = Literal[
    "fedit", "fedex", "ffa", "flora", "flexlora", "lora_fair", "centralized", "full"
]


class PartitionConfig(Section, title="partition"):
    """How the rows are split over the clients."""

    kind: Literal["iid", "contiguous", "dirichlet", "dirichlet_per_client", "natural", "sites"] = (
        "iid"
    )
    """Shuffled evenly; evenly in file order; each value of `column` dealt out unevenly over the
    clients; clients of one size, each with its own mix of values; a client per value; a client per
    file or directory of `files`."""
    files: str | Names = ()
    """For sites: the clients' files or directories, or globs of them; each client has the name of
    its own. They stand in place of data.path."""
    num_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    """Clients that the rows are split over; of sites as many as `files` has."""
    column: str | None = None
    """For dirichlet kinds and natural, such as type; also counted per client in partition.json."""
    alpha: Positive = 1.0
    """Dirichlet concentration: small gives clients of few kinds, large gives equal mixes."""
    min_examples: Count = 1
    """Splits of kind dirichlet that leave a client fewer are drawn again."""

    @model_validator(mode="before")
    @classmethod
    def _count_sites(cls, values: Any) -> Any:
        """Take the number of clients from the files, where it is not given and they are here."""
        if not isinstance(values, dict) or values.get("kind") != "sites":
            return values
        if "num_clients" not in values and (sites := find_sites(values.get("files"))):
            return values | {"num_clients": len(sites)}
        return values

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many clients there are, before rows are read."""
        known = "num_clients" in self.model_fields_set
        return {"sites": known, "natural": False}.get(self.kind, True)

    def problems(self) -> Iterator[str]:
        if bool(self.files) != (self.kind == "sites"):
            yield (
                "partition.files: expected files with kind: sites, and with no other, got "
                f"{shown(self.files)} with {self.kind}; set both or neither"
            )
        if self.kind not in ("iid", "contiguous", "sites") and self.column is None:
            yield (
                f"partition.column: {self.kind} splits by a column, got none; name one of the data"
            )


class FederationSection(Section, title="federation"):
    """The rounds, and who takes part in them."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1
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
    min_clients: Count = 1
    """Clients without which a round is not aggregated."""
    max_examples: Count | None = None
    """Most examples that a client counts for in the averages, whatever it reports; none: any."""
    fixed_examples: Annotated[tuple[Count, ...], AsTuple] = ()
    """Examples that each client counts for, in the order of their numbers, in place of what it
    reports; none: as reported."""

    def num_drawn(self, num_clients: int) -> int:
        """Return how many of the clients train in a round."""
        return max(1, math.floor(self.client_fraction * num_clients + 0.5))


class SiteSection(Section, title="site"):
    """This site, in a federation of real ones (docs/federation.md)."""

    number: Annotated[int, Field(ge=0)] | None = None
    """Its number among the sites, from 0, which no other site has."""
    send: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the adapter on its way to the server; bfloat16 halves it, and rounds each by up to
    0.4%, which no residual holds."""


class MethodConfig(Section, title="method"):
    """Which method aggregates, and its settings."""

    name: MethodName = "fedex"
    """fedit, fedex, ffa, flora, flexlora, lora_fair, centralized; full: no adapter, FedAvg on all
    weights."""
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

    fold: Literal["side", "planes", "carry", "round"] = "side"
    """side: a second frozen adapter, which grows with the rounds; planes: a second matrix beside
    each weight, for tens of rounds; carry: the base, with what rounding loses kept for the next
    fold; round: the base, rounded at every fold, as published."""
    side_rank: Count | Literal["auto"] = "auto"
    """Columns that the side adapter may come to have; auto: all rounds' (K-1)R, at most 512, and
    what this machine has room for."""
    side_tolerance: Share | Literal["auto"] = "auto"
    """Share of a round's residual, by norm, that a layer may leave out to save columns; auto: 0.001
    in bfloat16, which rounds away twice as much, and 0.000001 in float32."""
    clip_update_norm: Positive | None = None
    """Scale a client's change of the adapter down to this norm, over all factors; none: never."""
    reject_update_norm: Positive | None = None
    """Leave a client out of the round whose change has a larger norm than this; none: never."""
    robust: Literal["none", "clip", "trimmed"] = "none"
    """What one client may do that is not like the others: clip: its change is scaled down to the
    median of their norms; trimmed: it is left out where its norm or direction is not like most
    others' (docs/security.md, with what it costs)."""
    fold_kernel: bool = True
    """Fold a 16-bit weight in one pass where it is on a GPU with tensor cores for it (Ampere or
    later) and Triton is installed; false: by torch's operations, everywhere."""
