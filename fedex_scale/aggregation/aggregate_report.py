"""Where an aggregation puts what the adapter cannot hold, and what it tells of it afterwards."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace

from fedex_scale.aggregation.side import Growth, Past
from fedex_scale.aggregation.weights import FoldStats
from fedex_scale.config.federation import AggregateSection


@dataclass(frozen=True)
class LayerReport:
    """What one layer's aggregation did; norms are Frobenius norms, scaling included."""

    layer: str
    ideal_norm: float = 0.0
    """Of the update that exact averaging would make."""
    residual_norm: float = 0.0
    """Of the part that went to the side adapter or the base."""
    missed_norm: float = 0.0
    """Of the difference between that part and the change that the forward pass sees."""
    sum_norm: float | None = None
    """Of the sum of all rounds' residuals; None where there is but one round."""
    unseen_norm: float | None = None
    """Of the part of that sum that the forward pass does not see."""
    unseen_is_bound: bool = False
    """It is not known: as much as it can be at most."""
    side_rank: int = 0
    """Columns of the side adapter."""
    side_starts: bool = False
    """The side adapter begins anew with this round's columns."""
    side_capped: bool = False
    """It has no room for all that the forward pass should see."""
    note: str | None = None

    @property
    def kept(self) -> float:
        """Share of this round's part that the forward pass sees."""
        return _kept(self.missed_norm, self.residual_norm)

    def grown(self, growth: Growth, past: Past) -> LayerReport:
        """Return the same with what became of the side adapter."""
        columns = growth.part.V_PI.shape[0]
        starts = growth.whole or not past.num_columns
        return replace(
            self,
            missed_norm=growth.missed_norm,
            sum_norm=growth.sum_norm,
            unseen_norm=growth.unseen_norm,
            side_rank=columns if starts else past.num_columns + columns,
            side_starts=starts,
            side_capped=growth.capped,
        )

    def folded(self, stats: FoldStats, crossed: tuple[float, float] | None) -> LayerReport:
        """Return the same with what the fold into the base did.

        Args:
            stats: of all ranks.
            crossed: where the norms come from the fold, what the squared norm of the update has
                besides the fold's, and what the ideal update's has besides the update's.
        """
        layer = self
        if crossed is not None:
            update = max(0.0, stats.intended + crossed[0])
            ideal = max(0.0, update + crossed[1])
            layer = replace(layer, ideal_norm=math.sqrt(ideal), residual_norm=math.sqrt(update))
        layer = replace(layer, missed_norm=math.hypot(layer.missed_norm, math.sqrt(stats.missed)))
        if layer.unseen_norm is None or not stats.intended:
            return layer
        # A carry holds what is unseen. Without one, no more is known than that it adds up at most.
        unseen = layer.unseen_norm + layer.missed_norm
        if stats.carried:
            unseen = math.sqrt(stats.unseen)
        return replace(layer, unseen_norm=unseen, unseen_is_bound=not stats.carried)


@dataclass(kw_only=True)
class AggregateReport:
    """All layers of one round."""

    layers: list[LayerReport] = field(default_factory=list)
    base_changed: bool = False
    clients: list[dict[str, float]] = field(default_factory=list)
    """Each one's update, over all layers: its norm, and its cosine to the mean of the others."""
    outliers: list[str] = field(default_factory=list)
    """A line on each client that stands out."""
    cap: str | None = None
    """What to know where the side adapter is full, on one line."""

    def total(self, name: str) -> float:
        return math.sqrt(sum((getattr(layer, name) or 0.0) ** 2 for layer in self.layers))

    @property
    def kept(self) -> float:
        """Share of the round's residual that reached the forward pass: 1 is all of it."""
        return _kept(self.total("missed_norm"), self.total("residual_norm"))

    @property
    def kept_of_all(self) -> float | None:
        """Share of the sum of all rounds' residuals that the forward pass sees, or a bound of it.

        None if there is but one round, or if the bound says nothing: fold: round in bf16.
        """
        if not self.layers or any(layer.sum_norm is None for layer in self.layers):
            return None
        share = _kept(self.total("unseen_norm"), self.total("sum_norm"))
        says_nothing = share < 0 and any(layer.unseen_is_bound for layer in self.layers)
        return None if says_nothing else share

    @property
    def side_rank(self) -> int:
        """Columns of the side adapter, in the layer that has most."""
        return max((layer.side_rank for layer in self.layers), default=0)

    def as_dict(self) -> dict:
        """Return the report as it is written to disk."""
        names = ("ideal_norm", "residual_norm", "missed_norm", "sum_norm", "unseen_norm")
        return {
            "kept": self.kept,
            "kept_of_all": self.kept_of_all,
            **{name: self.total(name) for name in names},
            "base_changed": self.base_changed,
            "side_rank": self.side_rank,
            "cap": self.cap,
            "updates": self.clients,
            "outliers": self.outliers,
            "largest_layer": max(
                self.layers, key=lambda x: x.residual_norm, default=LayerReport("")
            ).layer,
            "layers": [asdict(x) | {"kept": x.kept} for x in self.layers],
        }

    def summary(self, section: AggregateSection) -> dict:
        """Return the few numbers that a person wants to see after a round."""
        short = ("kept", "kept_of_all", "ideal_norm", "residual_norm", "base_changed", "side_rank")
        short += ("largest_layer",)
        whole = self.as_dict()
        notes = sorted({layer.note for layer in self.layers if layer.note}) + self.outliers
        told = {"warning": self.warning(section), "cap": self.cap, "notes": notes}
        return {k: whole[k] for k in short} | told

    def warning(self, section: AggregateSection) -> str | None:
        """Return one plain line where a fold lost most of the residual, and None otherwise."""
        if self.kept >= 0.5 or self.cap:
            return None
        remedy = "raise side_rank" if section.fold == "side" else "use fold: side"
        return (
            f"only {max(0.0, self.kept):.1%} of this round's residual reached the forward pass: "
            f"the base's dtype rounds away most of what fold: {section.fold} adds to it; "
            f"{remedy}, or take a float32 base"
        )


def _kept(missed: float, intended: float) -> float:
    return 1.0 - missed / intended if intended > 0 else 1.0
