"""FedEx-LoRA (Singhal et al., arXiv:2410.09432): what the new pair lacks goes into the base.

For every assignment, s B A and the base update together are the ideal update.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods import flexlora, flora
from fedex_scale.methods.algebra import (
    Clients,
    LowRank,
    Pair,
    client_residual,
    compress_pieces,
    mean_pair,
    residual,
)
from fedex_scale.methods.interface import LayerUpdate


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    """Return the update for `config.assign`: average, reinit, keep or svd.

    With `svd_rank` (eq. 17-18), only the residual's best part of that rank is sent, and the rest
    is lost.
    """
    if config.assign == "reinit":
        return flora.update(clients, previous, config, generator)
    if config.assign == "svd":
        pair, rest = flexlora.leading_pair(clients, generator)
        return LayerUpdate(pair, rest)
    mean = mean_pair(clients)
    lost: Iterable[LowRank] = residual(clients, mean)
    if config.svd_rank is not None and config.svd_rank < _residual_rank(clients, mean):
        lost = [compress_pieces(lost, config.svd_rank)[0]]
    if config.assign == "average":
        return LayerUpdate(mean.float(), lost)
    own = partial(client_residual, clients, mean)
    return LayerUpdate(mean.float(), lost, client_update=own, replaces=True)


def _residual_rank(clients: Clients, mean: Pair) -> int:
    return (len(clients.pairs) - 1) * mean.A_RI.shape[0]
