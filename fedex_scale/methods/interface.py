"""What every method gets and answers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from fedex_scale.algebra import Clients, LowRank, Pair
from fedex_scale.errors import UserError

MethodName = Literal["fedit", "fedex", "ffa", "flora", "flexlora", "lora_fair", "centralized"]
Assignment = Literal["average", "reinit", "keep", "svd"]
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)


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


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which method aggregates, and its settings."""

    name: MethodName = "fedex"
    """fedit, fedex, ffa, flora, flexlora, lora_fair or centralized."""
    assign: Assignment = "average"
    """fedex: what clients start from: the mean pair, a fresh one, their own, or the rank-R SVD of
    the ideal update. What the pair lacks goes into the base."""
    svd_rank: int | None = None
    """fedex with `assign: average`: send only the best part of this rank of each residual."""
    fair_lambda: float = 0.01
    """lora_fair: price of the norm of its change to B."""

    def __post_init__(self) -> None:
        _check_choice("method.name", self.name, METHOD_NAMES)
        _check_choice("method.assign", self.assign, get_args(Assignment))
        if self.assign != "average" and self.name != "fedex":
            raise UserError(
                f"method.assign: {self.assign} needs method.name fedex, got {self.name}; "
                "drop method.assign"
            )
        if self.svd_rank is not None and (self.name, self.assign) != ("fedex", "average"):
            raise UserError(
                f"method.svd_rank: needs method.name fedex and method.assign average, got "
                f"{self.name} and {self.assign}; drop method.svd_rank"
            )
        if self.svd_rank is not None and self.svd_rank < 1:
            raise UserError(
                f"method.svd_rank: expected at least 1, got {self.svd_rank}; "
                "for no base update at all choose method.name fedit"
            )
        if not (math.isfinite(self.fair_lambda) and self.fair_lambda > 0):
            raise UserError(
                f"method.fair_lambda: expected a number above 0, got {self.fair_lambda}; "
                "the LoRA-FAIR paper uses 0.01"
            )


def _check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]}?" if near else "choose one of them"
        raise UserError(f"{field}: expected one of {', '.join(known)}, got {value}; {remedy}")


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
