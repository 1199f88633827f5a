"""How far averaging the factors falls from the ideal update, and how clients drift apart.

    M = s B_mean A_mean           what FedAvg on the factors makes of the clients
    E = ideal update - M          the residual, which FedAvg loses

All from the factors: one QR of either side of E and inner products, no dense matrix.
Source: Singhal et al., arXiv:2410.09432, section 6 and appendix F.

Legend: O out_features, I in_features, K clients, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from fedex_scale.methods.algebra import Clients, Pair, mean_pair, residual
from fedex_scale.methods.lowrank import LowRank, inner, norm, singular_values, stack

NUM_VALUES = 16
"""Singular values that are kept of each layer's residual."""


def measure(clients: Clients, previous: Pair | None) -> Deviation:
    """Measure one layer.

    Args:
        clients: few enough to be in memory at once.
        previous: the server's pair that the round began with; None: B A = 0.
    """
    mean = mean_pair(clients)
    lost = stack(*residual(clients, mean))
    averaged = LowRank(mean.B_OR * clients.scaling, mean.A_RI)
    values = singular_values(lost)
    square = values.square().sum().item()
    crossed = inner(averaged, lost)
    averaged_norm = norm(averaged)
    ideal_norm = math.sqrt(max(0.0, averaged_norm**2 + 2 * crossed + square))
    change = averaged
    if previous is not None:
        change = stack(averaged, LowRank(-clients.scaling * previous.B_OR, previous.A_RI))
    change_norm = math.sqrt(max(0.0, norm(change) ** 2 + 2 * inner(change, lost) + square))
    product = ideal_norm * averaged_norm
    return Deviation(
        num_entries=lost.U_OP.shape[0] * lost.V_PI.shape[1],
        residual_norm=math.sqrt(square),
        averaged_norm=averaged_norm,
        ideal_norm=ideal_norm,
        cosine=min(1.0, (averaged_norm**2 + crossed) / product) if product else 1.0,
        change_norm=change_norm,
        spread_norm=_spread(clients, mean, square),
        effective_rank=effective_rank(values),
        singular_values=tuple(values[:NUM_VALUES].tolist()),
    )


def _spread(clients: Clients, mean: Pair, residual_square: float) -> float:
    """Return sqrt(sum_k w_k ||s B_k A_k - ideal update||^2).

    As the weighted mean of s B_k A_k - M is E, that is sum_k w_k ||s B_k A_k - M||^2 - ||E||^2;
    each difference is taken between factors, which leaves small ones exact.
    """
    square = -residual_square
    for pair, weight in zip(clients.pairs, clients.weight_K, strict=True):
        own = pair.double()
        moved = LowRank(own.B_OR - mean.B_OR, own.A_RI), LowRank(mean.B_OR, own.A_RI - mean.A_RI)
        square += weight * (clients.scaling * norm(stack(*moved))) ** 2
    return math.sqrt(max(0.0, square))


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of the singular values, as shares of their sum; 0 for none.

    As many equal values would have that entropy.
    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = values.sum()
    if not total:
        return 0.0
    share = values[values > 0] / total
    return math.exp(-(share * share.log()).sum().item())


def total(parts: Sequence[Deviation]) -> Deviation:
    """Return the same of all layers together: norms and inner products of a block matrix."""

    def whole(name: str) -> float:
        return math.sqrt(sum(getattr(part, name) ** 2 for part in parts))

    norms = {
        name: whole(f"{name}_norm")
        for name in ("residual", "averaged", "ideal", "change", "spread")
    }
    product = norms["averaged"] * norms["ideal"]
    crossed = sum(part.cosine * part.averaged_norm * part.ideal_norm for part in parts)
    values = sorted((x for part in parts for x in part.singular_values), reverse=True)
    return Deviation(
        num_entries=sum(part.num_entries for part in parts),
        **{f"{name}_norm": value for name, value in norms.items()},
        cosine=min(1.0, crossed / product) if product else 1.0,
        effective_rank=sum(part.effective_rank for part in parts) / max(1, len(parts)),
        singular_values=tuple(values[:NUM_VALUES]),
    )


def as_tree(layers: Mapping[str, Deviation | None]) -> dict:
    """Return a round's deviation as it is written to disk; without figures where one is None."""
    if not layers:
        return {"note": "weights are averaged whole", "total": None, "layers": []}
    known = [part for part in layers.values() if part is not None]
    if len(known) < len(layers):
        reason = "left out: with so many clients a layer is read in parts, one after another"
        return {"note": reason, "total": None, "layers": []}
    return {
        "note": None,
        "total": total(known).as_dict(),
        "layers": [{"layer": layer, **part.as_dict()} for layer, part in layers.items()],
    }


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One layer, or all of them; Frobenius norms include the scaling s = alpha / R.

    Fields:
        num_entries: O I.
        residual_norm: of E, what FedAvg on the factors loses.
        averaged_norm, ideal_norm: of M, and of the ideal update M + E.
        cosine: of the angle between M and M + E.
        change_norm: of the ideal update less the product that the round began with.
        spread_norm: root of the weighted mean squared distance of a client from the ideal update.
        effective_rank: of E; of all layers, their mean.
        singular_values: the largest ones of E, falling.
    """

    num_entries: int
    residual_norm: float
    averaged_norm: float
    ideal_norm: float
    cosine: float
    change_norm: float
    spread_norm: float
    effective_rank: float
    singular_values: tuple[float, ...]

    @property
    def scaled(self) -> float:
        """The residual's norm over sqrt(O I), so that layers of all shapes compare."""
        return self.residual_norm / math.sqrt(self.num_entries)

    @property
    def norm_ratio(self) -> float:
        """FedAvg's update over the ideal one."""
        return self.averaged_norm / self.ideal_norm if self.ideal_norm else 1.0

    @property
    def relative(self) -> float:
        """The residual over the ideal update's change in this round."""
        return self.residual_norm / self.change_norm if self.change_norm else 0.0

    @property
    def drift(self) -> float:
        """How far clients are apart, over how far they moved together in this round."""
        return self.spread_norm / self.change_norm if self.change_norm else 0.0

    def as_dict(self) -> dict:
        derived = ("scaled", "norm_ratio", "relative", "drift")
        return asdict(self) | {name: getattr(self, name) for name in derived}
