"""FFA-LoRA (Sun et al., arXiv:2403.12313): A is frozen, so that averaging B is exact."""

from __future__ import annotations

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, Pair, mean_pair
from fedex_scale.methods.interface import LayerUpdate
from fedex_scale.runtime.errors import UserError

A_TOLERANCE = 2.0**-8
"""Relative; lets a client pass that stores its untouched A in bf16."""


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    """Return the previous A, untouched, and the mean B.

    Without a previous pair, A is the first client's.

    Raises:
        UserError: a client changed A.
    """
    A_RI = (clients.pairs[0] if previous is None else previous).A_RI.float()
    for k in range(len(clients.pairs)):
        moved = ((clients.pairs[k].A_RI.float() - A_RI).norm() / A_RI.norm()).item()
        if moved > A_TOLERANCE:
            raise UserError(
                f"client {k}: expected the server's A, which ffa freezes, got one that differs by "
                f"{moved:.1%}; train only B, or choose method fedex"
            )
    return LayerUpdate(Pair(A_RI, mean_pair(clients).B_OR.float()))
