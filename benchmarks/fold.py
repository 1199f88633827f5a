"""Time and memory of a fold: ours, its bare arithmetic, and the dense procedure as published.

    python benchmarks/fold.py [--quick]

A bf16 weight of Mistral-7B's shape takes the residual of three clients of rank 32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import Figure, Ratio, forget_peak, in_turns, memory, quotients, report, start
from torch import Tensor

from fedex_scale.aggregation.weights import Target, fold
from fedex_scale.methods.algebra import Clients, LowRank, Pair, mean_pair, residual

SCALING = 0.5


def benchmark(args: argparse.Namespace) -> None:
    num_out, num_in = (512, 1024) if args.quick else (4096, 14336)
    clients, W_OI = make(num_out, num_in, num_clients=3, rank=32)
    memory = {"ours": peak_of(lambda: ours(clients, W_OI))}
    memory["published"] = peak_of(lambda: published(clients, W_OI))
    rest = list(residual(clients, mean_pair(clients)))
    buffer_OI, copy_OI = torch.zeros(num_out, num_in), torch.empty_like(W_OI)
    carried = target(W_OI)
    measures = {
        "product": lambda: product(rest, buffer_OI),
        "copy": lambda: copy_OI.copy_(W_OI),
        "fold": lambda: fold(target(W_OI), rest, carry=False),
        "fold with carry": lambda: fold(carried, rest, carry=True),
        "ours, factors included": lambda: ours(clients, W_OI),
        "published": lambda: published(clients, W_OI),
    }
    for measure in measures.values():
        measure()
    timed = [lambda n=name, m=measure: {n: seconds_of(m)} for name, measure in measures.items()]
    values = in_turns(timed, 2 if args.quick else 15)
    bare = [a + b for a, b in zip(values["product"], values["copy"], strict=True)]
    whole = values["ours, factors included"]
    report(
        __file__,
        f"{num_out} x {num_in} bf16, 3 clients of rank 32",
        [
            *(Figure(name=n, values=[x * 1e3 for x in v], unit="ms") for n, v in values.items()),
            *(Figure(name=f"{n}: extra memory", values=[v], unit="MB") for n, v in memory.items()),
        ],
        [
            Ratio(
                name="fold / (product + copy)", values=quotients(values["fold"], bare), at_most=1.5
            ),
            Ratio(
                name="published / ours", values=quotients(values["published"], whole), at_least=10
            ),
            Ratio(
                name="extra memory, ours / published",
                values=[memory["ours"] / memory["published"]],
                at_most=0.05,
            ),
        ],
    )


def make(num_out: int, num_in: int, *, num_clients: int, rank: int) -> tuple[Clients, Tensor]:
    """Return clients near a common pair, and a bf16 weight."""
    draw = torch.Generator().manual_seed(0)
    A_RI = torch.randn(rank, num_in, generator=draw) * 0.02
    B_OR = torch.randn(num_out, rank, generator=draw) * 0.02
    pairs = [
        Pair(
            A_RI + 0.002 * torch.randn(A_RI.shape, generator=draw),
            B_OR + 0.002 * torch.randn(B_OR.shape, generator=draw),
        )
        for _ in range(num_clients)
    ]
    W_OI = torch.randn(num_out, num_in, generator=draw).mul_(0.02).bfloat16()
    return Clients(pairs, [1 / num_clients] * num_clients, SCALING), W_OI


def target(W_OI: Tensor) -> Target:
    return Target(flat=W_OI.view(-1), shape=tuple(W_OI.shape))


def product(pieces: list[LowRank], out: Tensor) -> None:
    """Multiply the same stacked factors into a ready buffer, and nothing else."""
    for piece in pieces:
        torch.mm(piece.U_OP, piece.V_PI, out=out)


def ours(clients: Clients, W_OI: Tensor) -> None:
    fold(target(W_OI), list(residual(clients, mean_pair(clients))), carry=False)


def published(clients: Clients, W_OI: Tensor) -> None:
    """Average the clients' dense products, subtract the product of the averages, and add."""
    products = [pair.B_OR @ pair.A_RI for pair in clients.pairs]
    mean_product = torch.stack(products).mean(0)
    B_OR = torch.stack([pair.B_OR for pair in clients.pairs]).mean(0)
    A_RI = torch.stack([pair.A_RI for pair in clients.pairs]).mean(0)
    W_OI += ((mean_product - B_OR @ A_RI) * clients.scaling).to(W_OI.dtype)


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_of(call: Callable[[], object]) -> float:
    """Return by how many MB this process's resident memory rose at most; Linux only."""
    forget_peak()
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1e6


if __name__ == "__main__":
    start(__doc__, benchmark)
