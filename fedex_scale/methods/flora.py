"""FLoRA (Wang et al., arXiv:2409.05976): the stacked update goes into the base, the pair restarts.

`fedex` with `assign: reinit` is the same step.
"""

from __future__ import annotations

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, Pair, ideal_update
from fedex_scale.methods.interface import LayerUpdate, fresh_pair


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    return LayerUpdate(fresh_pair(clients.pairs[0], generator), ideal_update(clients))
