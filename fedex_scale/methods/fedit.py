"""FedIT (Zhang et al., arXiv:2305.05644): FedAvg on A and on B, each by itself.

With a single client, as in `centralized`, the mean is that client's pair, bit for bit.
"""

from __future__ import annotations

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, Pair, mean_pair
from fedex_scale.methods.interface import LayerUpdate


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    return LayerUpdate(mean_pair(clients).float())
