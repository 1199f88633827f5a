"""What becomes of the residual of really trained clients in a bf16 base, by where it is put.

    python benchmarks/exactness.py [--model models/SmolLM2-135M-Instruct] [--steps 15] [--quick]

Three clients train on word problems, once from one draw of A for all (the paper, eq. 10) and once
from a draw each (its public code). Each round is then folded into the bf16 base in every way, and
what a forward pass sees is compared with the residual, in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from common import describe_machine, start
from torch import Tensor

from fedex_scale.aggregation.weights import Target, fold
from fedex_scale.data.word_problems import generate, write_jsonl
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.files.basefiles import BaseFiles, base_directory
from fedex_scale.methods.algebra import Clients, LowRank, mean_pair, residual
from fedex_scale.run import run_config

RANK, ALPHA, CLIENTS = 32, 16, 3


def benchmark(args: argparse.Namespace) -> None:
    steps = [3] if args.quick else [int(number) for number in args.steps.split(",")]
    settings = f"{args.model}, rank {RANK}, alpha {ALPHA}, {CLIENTS} clients, lr 5e-4, batch 8"
    print(f"{settings}\n{describe_machine()}\n")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for init in ("shared", "per_client"):
            for number in steps:
                clients = train(args.model, Path(name), init, number)
                base = BaseFiles(base_directory(args.model))
                rows.append({"A": init, "steps": number, **measure(base, clients)})
    print(markdown(rows))
    print(json.dumps({"benchmark": "exactness", "settings": settings, "rows": rows}))


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    cells = [[_short(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(value: object) -> str:
    return f"{100 * value:.4g}%" if isinstance(value, float) else str(value)


def train(model: str, scratch: Path, init: str, steps: int) -> list[Adapter]:
    """Train a round's clients; return their adapters."""
    data = scratch / "train.jsonl"
    write_jsonl(generate(0, train=2000, heldout=1)[0], data)
    name = f"{init}-{steps}"
    config = {
        "run": {"name": name, "dir": str(scratch)},
        "model": {"path": model, "dtype": "float32"},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "data": {"path": str(data), "schema": "metamath", "max_length": 256},
        "partition": {"num_clients": CLIENTS},
        "federation": {"init": init},
        "train": {
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 5e-4,
            "max_steps": steps,
        },
    }
    file = scratch / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    run_config(file, [])
    root = scratch / name / "clients" / "round-0001"
    return [Adapter(path) for path in sorted(root.iterdir())]


def measure(base: BaseFiles, clients: Sequence[Adapter]) -> dict[str, float]:
    """Return ratios of Frobenius norms over all layers, and the share of unchanged entries."""
    squares: dict[str, float] = {}
    unchanged = numel = 0

    def add(name: str, value: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + value.norm().item() ** 2

    for layer in clients[0].layers:
        W_OI = base.read(base.find(layer)).bfloat16()  # as a bf16 engine holds it
        scaling, device = clients[0].scaling_of(layer), torch.device("cpu")
        pairs = list(LayerPairs(clients, layer, rank=RANK, scaling=scaling, device=device))
        whole = Clients(pairs, [1 / len(clients)] * len(clients), scaling)
        factors = list(residual(whole, mean_pair(whole)))
        ideal_OI, delta_OI = dense(whole)
        add("ideal", ideal_OI)
        add("residual", delta_OI)
        add("weights", W_OI.double())
        rounded, carry = folded(W_OI, factors)
        change_OI = rounded.double() - W_OI.double()
        unchanged += int((rounded == W_OI).sum())
        numel += W_OI.numel()
        add("rounded into bf16", change_OI - delta_OI)
        add("bf16 + carry plane", change_OI + carry.double() - delta_OI)
        for dtype in (torch.bfloat16, torch.float32):
            held = [[factor.to(dtype).double() for factor in piece] for piece in factors]
            add(f"side adapter, {str(dtype)[6:]}", sum(U @ V for U, V in held) - delta_OI)
    size = {name: math.sqrt(square) for name, square in squares.items()}
    ideal, lost, weights = size.pop("ideal"), size.pop("residual"), size.pop("weights")
    return {
        "residual / ideal update": lost / ideal,
        "residual / weights": lost / weights,
        "bf16 entries unchanged": unchanged / numel,
        **{f"lost: {name}": value / lost for name, value in size.items()},
    }


def dense(clients: Clients) -> tuple[Tensor, Tensor]:
    """Return the ideal update and the residual by their definition, float64."""
    w, s = clients.weight_K, clients.scaling
    A, B = zip(*((pair.A_RI.double(), pair.B_OR.double()) for pair in clients.pairs), strict=True)
    ideal_OI = s * sum(w_k * B_k @ A_k for w_k, A_k, B_k in zip(w, A, B, strict=True))
    mean_A, mean_B = (sum(w_k * x for w_k, x in zip(w, X, strict=True)) for X in (A, B))
    return ideal_OI, ideal_OI - s * mean_B @ mean_A


def folded(W_OI: Tensor, pieces: list[LowRank]) -> tuple[Tensor, Tensor]:
    """Return the weight with the pieces rounded into it, and what rounding kept out, float32."""
    W_OI = W_OI.clone()
    target = Target(flat=W_OI.view(-1), shape=tuple(W_OI.shape))
    fold(target, pieces, carry=True)
    return W_OI, target.carry.view_as(W_OI)


if __name__ == "__main__":
    start(
        __doc__,
        benchmark,
        steps={"default": "15", "help": "optimizer steps a client (%(default)s)"},
    )
