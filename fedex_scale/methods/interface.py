"""What every method gets and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, LowRank, Pair


def fresh_pair(like: Pair, generator: torch.Generator) -> Pair:
    """Return a pair as PEFT starts one: A from kaiming_uniform(a=sqrt(5)), B zero; float32.

    That is A uniform within 1 / sqrt(I), where the FedEx-LoRA paper (eq. 10) draws a Gaussian. The
    draw is made on the CPU, so that it is the same on every device.

    Args:
        like: gives shapes and device.
        generator: a CPU generator, seeded for this layer and round.
    """
    A_RI = torch.empty(like.A_RI.shape, dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=generator)
    B_OR = torch.zeros(like.B_OR.shape, dtype=torch.float32)
    return Pair(A_RI.to(like.A_RI.device), B_OR.to(like.B_OR.device))


class LayerUpdate(NamedTuple):
    """A method's answer for one layer.

    Fields:
        pair: the server's new A and B, float32.
        base_update: to add to the base weight, scaling included. The pieces are computed as they
            are iterated, which can be done again and again.
        client_update: only for `assign: keep`, where client i goes on with its own A_i and B_i:
            what client i's base weight has beyond the initial one.
        replaces: the base update (and the clients') takes the place of the last round's, where it
            otherwise adds to it. So for `assign: keep`: pairs that are never reset hold all that
            was ever learned, and the ideal update with them.
        note: what the user should know, on one line; None if all is well.
    """

    pair: Pair
    base_update: Iterable[LowRank] = ()
    client_update: Callable[[int], Iterable[LowRank]] | None = None
    replaces: bool = False
    note: str | None = None


class Method(NamedTuple):
    """A way to aggregate.

    Fields:
        update: a pure function of one layer: clients, the server's previous pair (None if
            unknown), the settings, and a CPU generator seeded for this round and layer.
        trains: which of A and B the clients train.
        one_client: all data belong to a single client.
    """

    update: Callable[[Clients, Pair | None, MethodConfig, torch.Generator], LayerUpdate]
    trains: frozenset[str] = frozenset("AB")
    one_client: bool = False
