"""What a run's rounds cost in columns of the side adapter, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import add, mul

from fedex_scale.aggregation.ranks import base_update_rank, side_rank_of
from fedex_scale.config.settings import Config


@dataclass(frozen=True, kw_only=True)
class Side:
    """Columns of the side adapter.

    Fields:
        each: of a round's residual; 0 where the method has none.
        most: that it may come to have; 0 without one.
        rounds: of the run.
        writable: planes may take its place.
    """

    each: int
    most: int
    rounds: int
    writable: bool

    @classmethod
    def of(cls, config: Config, clients: int) -> Side:
        setting = (clients, config.lora.rank)
        return cls(
            each=base_update_rank(config.method, *setting),
            most=side_rank_of(config.method, config.aggregate, *setting, config.federation.rounds),
            rounds=config.federation.rounds,
            writable=config.model.quantization == "none",
        )

    @property
    def trained(self) -> int:
        """Columns that the last round's clients train with."""
        return min(self.most, self.each * (self.rounds - 1))

    def note(self, shapes: Mapping[str, tuple[int, int]]) -> str | None:
        """Return what the rounds cost in columns, and what a cap keeps out; None without a side."""
        held = self.most // self.each if self.most else 0
        if not self.most or (self.rounds == 1 and held):
            return None
        columns, weights = (sum(f(*x) for x in shapes.values()) for f in (add, mul))
        line = (
            f"the side adapter grows to {self.trained} columns in the last round's training, "
            f"{self.trained * columns / weights:.0%} more work in the adapted layers"
        )
        if held < self.rounds and self.most < max(map(min, shapes.values())):
            line += (
                f"; its {self.most} columns hold {held} of {self.rounds} rounds whole, and later "
                "ones lose a part in the forward pass, which the server keeps; "
                f"aggregate.side_rank={self.each * self.rounds} holds all"
            )
        if not self.writable:
            return line
        return (
            f"{line}; aggregate.fold=planes does as much work from round "
            f"{weights // (self.each * columns) + 2} on"
        )
