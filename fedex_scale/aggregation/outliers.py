"""Which clients' updates stand out, by their size or their direction, from the others'.

An update of a layer is s B A, never formed: with a random P of a few columns, inner products of
(s B A) P estimate those of s B A without bias, and over the layers of a model to a few percent.
Nothing is left out because of it; a person is told. What `robust: trimmed` leaves out is seen on
exact products.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedex_scale.methods.algebra import Clients, all_finite

EXACT_BELOW = 512  # input features up to which nothing is drawn
COLUMNS = 8
ROWS = 64
PLACES = 4096
SMALL = 1e-30  # of a squared norm
COPY = 3e-6
"""Share of their norms, up to which two updates differ that are one."""
FACTOR = 10.0
"""Of the median, from which on an update's norm is told of; and one over it."""
DEVIATIONS = 3.5
"""The same of five or more clients: in robust standard deviations of the norms' logarithms."""
OPPOSED = -0.2
"""Cosine to the mean of the others, from which on down a direction is told of."""


@dataclass
class Likeness:
    """Inner products of the clients' updates, summed over layers, and of the weights they train
    whole; float64, in which a square of whatever float32 holds is finite."""

    gram_KK: Tensor | None = field(default=None, repr=False)
    whole_KK: Tensor | None = field(default=None, repr=False)

    def add(self, clients: Clients, *, few: bool = True) -> None:
        """Add a layer.

        Args:
            few: the clients are held in memory, and the layer's outputs are not drawn as well.
        """
        gram_KK = _gram(clients, few, torch.float32)
        sizes = gram_KK.diagonal()
        if not all_finite(gram_KK) or sizes.min() < SMALL:  # of what float32 may not hold
            gram_KK = _gram(clients, few, torch.float64)
        self.gram_KK = _sum(self.gram_KK, gram_KK)

    def add_whole(self, parts: Iterable[Tensor]) -> None:
        """Add one part of a weight that clients train whole, one tensor a client.

        Numbers of random signs share a few thousand places.
        """
        seen, signs = [], None
        for part in parts:
            flat = part.double().flatten()
            if len(flat) > PLACES:
                if signs is None:
                    generator = torch.Generator().manual_seed(len(flat))
                    signs = torch.randint(0, 2, (len(flat),), generator=generator) * 2 - 1
                flat = pad(flat * signs, (0, -len(flat) % PLACES)).view(-1, PLACES).sum(0)
            seen.append(flat)
        seen_KN = torch.stack(seen)
        self.whole_KK = _sum(self.whole_KK, seen_KN @ seen_KN.T)

    def clients(self) -> list[dict[str, float]]:
        """Return each client's norm, and the cosine of its update to the mean of the others'."""
        return [] if self.gram_KK is None else _clients(self.gram_KK)

    def notes(self, names: Sequence[object]) -> list[str]:
        """Return a line for each client that stands out, or that is another one's copy."""
        found = []
        for gram_KK, what in ((self.gram_KK, "it"), (self.whole_KK, "what it trained whole")):
            if gram_KK is not None and len(gram_KK) > 1:
                found += _notes(gram_KK, names, what)
        grams = [x for x in (self.gram_KK, self.whole_KK) if x is not None]
        return found + _copies(grams, names)


def _gram(clients: Clients, few: bool, dtype: torch.dtype) -> Tensor:
    """Return one layer's inner products, float64, of sketches that are computed in `dtype`."""
    num_out, num_in = clients.pairs[0].B_OR.shape[0], clients.pairs[0].A_RI.shape[1]
    right = _drawn(num_in, COLUMNS) if num_in > EXACT_BELOW else None
    left = None if few else _drawn(num_out, ROWS)
    seen = []
    for pair in clients.pairs:
        A_RI, B_OR = pair.A_RI.to(dtype), pair.B_OR.to(dtype)
        AP_RP = A_RI if right is None else A_RI @ right.to(A_RI)
        LB_SR = B_OR if left is None else left.T.to(B_OR) @ B_OR
        seen.append((clients.scaling * (LB_SR @ AP_RP)).flatten().double())
    seen_KN = torch.stack(seen)
    return (seen_KN @ seen_KN.T).cpu()


@lru_cache(maxsize=64)
def _drawn(num: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, columns, generator=generator) / math.sqrt(columns)


def _sum(total: Tensor | None, gram_KK: Tensor) -> Tensor:
    return gram_KK if total is None else total + gram_KK


def _clients(gram_KK: Tensor) -> list[dict[str, float]]:
    found = []
    for k in range(len(gram_KK)):
        own, shared = float(gram_KK[k, k]), float(gram_KK[k].sum() - gram_KK[k, k])
        others = float(gram_KK.sum() - 2 * gram_KK[k].sum() + gram_KK[k, k])
        size = math.sqrt(max(0.0, own)) * math.sqrt(max(0.0, others))
        cosine = max(-1.0, min(1.0, shared / size)) if size else 0.0
        found.append({"norm": math.sqrt(max(0.0, own)), "cosine": cosine})
    return found


def _notes(gram_KK: Tensor, names: Sequence[object], what: str) -> list[str]:
    clients, found = _clients(gram_KK), []
    norms, whose = [client["norm"] for client in clients], "its" if what == "it" else f"{what}: its"
    for k, (client, name) in enumerate(zip(clients, names, strict=False)):
        if odd := _odd_norm(norms, k):
            found.append(f"{name}: {whose} {odd}")
        if client["cosine"] < OPPOSED:
            cosine = f"cosine {client['cosine']:.2f}"
            found.append(f"{name}: {what} points against the others' mean ({cosine})")
    return found


def _copies(grams: Sequence[Tensor], names: Sequence[object]) -> list[str]:
    """Return a line for each client whose update is an earlier one's, however it is written."""
    found = []
    for k, name in enumerate(names):
        for j in range(k):
            alike = grams and name != names[j]  # else it is told of already
            if alike and all(_same(gram_KK, j, k) for gram_KK in grams):
                found.append(f"{name}: the same update as {names[j]}, which then counts twice")
                break
    return found


def _same(gram_KK: Tensor, j: int, k: int) -> bool:
    both = float(gram_KK[j, j] + gram_KK[k, k])
    return both > 0 and both - 2 * float(gram_KK[j, k]) <= COPY**2 * both


def standing_out(gram_KK: Tensor) -> list[int]:
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
    if not usual:
        return f"norm is {norms[k]:.3g}, where most have 0" if norms[k] else ""
    share = f"norm is {norms[k] / usual:.3g} times the median"
    if not 1 / FACTOR < norms[k] / usual < FACTOR:
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
