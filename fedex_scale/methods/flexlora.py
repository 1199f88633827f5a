"""FlexLoRA (Bai et al., arXiv:2402.11505): the pair is the ideal update's rank-R SVD."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, LowRank, Pair, compress_pieces, ideal_update
from fedex_scale.methods.interface import LayerUpdate, fresh_pair


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    return LayerUpdate(leading_pair(clients, generator)[0])


def leading_pair(clients: Clients, generator: torch.Generator) -> tuple[Pair, Iterable[LowRank]]:
    """Return a pair whose s B A is the best rank-R part of the ideal update, and the rest of it.

    Singular values are shared evenly between A and B. Where the ideal update has a rank below R,
    the spare rows of A are drawn afresh: with A and B both zero they could never train again.
    """
    pieces = ideal_update(clients)
    fresh = fresh_pair(clients.pairs[0], generator)
    best, rest = compress_pieces(pieces, rank=fresh.A_RI.shape[0])
    A_RI = best.V_PI / math.sqrt(clients.scaling)
    spare_R1 = (A_RI == 0).all(dim=1, keepdim=True)
    A_RI = torch.where(spare_R1, fresh.A_RI, A_RI)
    return Pair(A_RI, best.U_OP / math.sqrt(clients.scaling)), rest
