"""Which clients' updates stand out, by their size or their direction, from the others'.

An update of a layer is s B A, never formed: with a random P of a few columns, inner products of
(s B A) P estimate those of s B A without bias, and over the layers of a model to a few percent.
Nothing is left out because of it; a person is told. What `robust: trimmed` leaves out is seen on
exact products.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedex_scale.methods.algebra import Clients

EXACT_BELOW = 512  # input features up to which nothing is drawn
COLUMNS = 8
FACTOR = 10.0
"""Of the median, from which on an update's norm is told of; and one over it."""
DEVIATIONS = 3.5
"""The same of five or more clients: in robust standard deviations of the norms' logarithms."""
OPPOSED = -0.2
"""Cosine to the mean of the others, from which on down a direction is told of."""


@dataclass
class Likeness:
    """Inner products of the clients' updates, summed over layers."""

    gram_KK: torch.Tensor | None = field(default=None, repr=False)

    def add(self, clients: Clients) -> None:
        """Add a layer whose clients are in memory."""
        num_in = clients.pairs[0].A_RI.shape[1]
        seen = []
        draw = None
        if num_in > EXACT_BELOW:
            generator = torch.Generator().manual_seed(num_in)
            draw = torch.randn(num_in, COLUMNS, generator=generator) / math.sqrt(COLUMNS)
        for pair in clients.pairs:
            A_RI, B_OR = pair.A_RI.float(), pair.B_OR.float()
            AP_RP = A_RI if draw is None else A_RI @ draw.to(A_RI.device)
            seen.append((clients.scaling * (B_OR @ AP_RP)).flatten())
        seen_KN = torch.stack(seen)
        gram = (seen_KN @ seen_KN.T).double().cpu()
        self.gram_KK = gram if self.gram_KK is None else self.gram_KK + gram

    def clients(self) -> list[dict[str, float]]:
        """Return each client's norm, and the cosine of its update to the mean of the others'."""
        if self.gram_KK is None or not self.gram_KK.isfinite().all():
            return []
        gram, found = self.gram_KK, []
        for k in range(len(gram)):
            own, shared = float(gram[k, k]), float(gram[k].sum() - gram[k, k])
            others = float(gram.sum() - 2 * gram[k].sum() + gram[k, k])
            size = math.sqrt(max(0.0, own * others))
            cosine = max(-1.0, min(1.0, shared / size)) if size else 0.0
            found.append({"norm": math.sqrt(max(0.0, own)), "cosine": cosine})
        return found


def notes(clients: Sequence[dict[str, float]], names: Sequence[object]) -> list[str]:
    """Return a line for each client that stands out.

    Args:
        clients: as `Likeness.clients` tells.
        names: of the clients.
    """
    found = []
    norms = [client["norm"] for client in clients]
    for k, (client, name) in enumerate(zip(clients, names, strict=False)):
        if len(norms) > 1 and (odd := _odd_norm(norms, k)):
            found.append(f"{name}: {odd}")
        if len(norms) > 1 and client["cosine"] < OPPOSED:
            cosine = f"cosine {client['cosine']:.2f}"
            found.append(f"{name}: it points against the others' mean ({cosine})")
    return found


def standing_out(gram_KK: torch.Tensor) -> list[int]:
    """Return the clients whose norm or direction is not like that of most; of two, nobody.

    A direction by the median of its cosines to the others': a mean of them is whatever the largest
    says.

    Args:
        gram_KK: inner products of the updates, float64.
    """
    norms = gram_KK.diagonal().clamp(min=0).sqrt().tolist()
    if len(norms) < 3:
        return []
    found = []
    for k, norm in enumerate(norms):
        cosines = [
            float(gram_KK[k, j]) / (norm * other) if norm * other else 0.0
            for j, other in enumerate(norms)
            if j != k
        ]
        if _odd_norm(norms, k) or statistics.median(cosines) < OPPOSED:
            found.append(k)
    return found


def _odd_norm(norms: Sequence[float], k: int) -> str:
    """Return what is unusual about a norm; nothing, if it is like the others."""
    usual, others = statistics.median_low(norms), [*norms[:k], *norms[k + 1 :]]
    share = f"its norm is {norms[k] / usual:.3g} times the median" if usual else ""
    if usual and not 1 / FACTOR < norms[k] / usual < FACTOR:
        return share
    z = _deviations(norms[k], others)
    return f"{share}, {z:.1f} robust standard deviations away" if z > DEVIATIONS else ""


def _deviations(norm: float, others: Sequence[float]) -> float:
    """Return how far a norm's logarithm is from the others', in their robust deviation."""
    if len(others) < 4 or norm <= 0 or min(others) <= 0:
        return 0.0
    logs = [math.log(x) for x in others]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    return abs(math.log(norm) - middle) / max(spread, 0.1)
