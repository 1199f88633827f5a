"""Where an aggregation puts what the adapter cannot hold, and what it tells of it afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedex_scale.config.federation import AggregateSection


@dataclass(frozen=True)
class LayerReport:
    """What one layer's aggregation did; norms are Frobenius norms, scaling included."""

    layer: str
    ideal_norm: float
    """Of the update that exact averaging would make."""
    residual_norm: float
    """Of the part that went to the side adapter or the base."""
    missed_norm: float
    """Of the part of the residual that the forward pass does not see."""
    note: str | None = None

    @property
    def kept(self) -> float:
        return _kept(self.missed_norm, self.residual_norm)


@dataclass(kw_only=True)
class AggregateReport:
    """All layers of one round."""

    layers: list[LayerReport] = field(default_factory=list)
    base_changed: bool = False

    def total(self, name: str) -> float:
        return math.sqrt(sum(getattr(layer, name) ** 2 for layer in self.layers))

    @property
    def kept(self) -> float:
        """Share of the round's residual that reached the forward pass: 1 is all of it."""
        return _kept(self.total("missed_norm"), self.total("residual_norm"))

    def as_dict(self) -> dict:
        """Return the report as it is written to disk."""
        names = ("ideal_norm", "residual_norm", "missed_norm")
        return {
            "kept": self.kept,
            **{name: self.total(name) for name in names},
            "base_changed": self.base_changed,
            "largest_layer": max(self.layers, key=lambda x: x.residual_norm).layer,
            "layers": [
                {
                    "layer": x.layer,
                    **{name: getattr(x, name) for name in names},
                    "kept": x.kept,
                    "note": x.note,
                }
                for x in self.layers
            ],
        }

    def summary(self, section: AggregateSection) -> dict:
        """Return the few numbers that a person wants to see after a round."""
        short = ("kept", "ideal_norm", "residual_norm", "base_changed", "largest_layer")
        whole = self.as_dict()
        notes = sorted({layer.note for layer in self.layers if layer.note})
        return {k: whole[k] for k in short} | {"warning": self.warning(section), "notes": notes}

    def warning(self, section: AggregateSection) -> str | None:
        """Return one plain line where most of the residual was lost, and None otherwise."""
        if self.kept >= 0.5:
            return None
        remedy = "raise side_rank" if section.fold == "side" else "use fold: side"
        return (
            f"only {max(0.0, self.kept):.1%} of this round's residual reached the forward pass: "
            f"the base's dtype rounds away most of what fold: {section.fold} adds to it; "
            f"{remedy}, or take a float32 base"
        )


def _kept(missed: float, intended: float) -> float:
    return 1.0 - missed / intended if intended > 0 else 1.0
