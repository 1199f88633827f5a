"""What `aggregate.robust` costs in exactness, where nobody attacks and where the first client does.

    python benchmarks/robust.py [--clients 10] [--rank 8] [--rounds 5] [--steps 3] [--quick]

Clients train on word problems, as in rounds.py. Then the first one's change since the server's
adapter is multiplied by a factor, and what would be aggregated is compared with the exact ideal
update of the honest clients, as a share of that update's norm: after the first round and the last.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import describe_machine, start
from rounds import write_config

from fedex_scale.aggregation.aggregator import Round
from fedex_scale.aggregation.screening import screen
from fedex_scale.config.federation import AggregateSection
from fedex_scale.files.adapter_writers import AdapterWriter
from fedex_scale.files.adapters import Adapter, LayerPairs
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import Clients, LowRank, Pair, ideal_update, norm, stack
from fedex_scale.run import run_config

FACTORS = {"honest": 1, "its change reversed": -1, "100 times its change": 100, "-10 times": -10}
WAYS = ("none", "clip", "trimmed")


def benchmark(args: argparse.Namespace) -> None:
    print(f"{args.clients} clients, rank {args.rank}\n{describe_machine()}\n", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        number = 2 if args.quick else args.rounds
        config = write_config(args, scratch, args.clients, "shared", number)
        run = RunDir(run_config(config, []))
        for what, factor in FACTORS.items():
            for last in (1, number):
                place = scratch / f"{what}-{last}"
                honest, attacked = attack(run, last, args.clients, factor, place)
                for way in WAYS:
                    taken = screen(attacked, AggregateSection(robust=way)).round
                    share = difference(taken, honest)
                    rows.append({"client": what, "round": last, "robust": way, "share": share})
    print("| first client | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
    for what in FACTORS:
        mine = [row for row in rows if row["client"] == what]
        cells = [", ".join(f"{x['share']:.1%}" for x in mine if x["robust"] == way) for way in WAYS]
        print(f"| {what} | " + " | ".join(cells) + " |")
    print(json.dumps({"benchmark": "robust", "rows": rows}))


def attack(run: RunDir, number: int, count: int, factor: int, out: Path) -> tuple[Round, Round]:
    """Return a round of a run, and the same with a first client whose change is multiplied."""
    server = Adapter(run.adapter(number - 1))
    clients = [Adapter(run.client(number, k)) for k in range(count)]
    shapes = {layer: server.shapes(layer) for layer in server.layers}
    alpha = server.config["lora_alpha"]
    with AdapterWriter(out, shapes, rank=server.rank, alpha=alpha, base="") as writer:
        for layer in shapes:
            before, after = server.pair(layer), clients[0].pair(layer)
            writer.write(
                layer, Pair(*(x + factor * (y - x) for x, y in zip(before, after, strict=True)))
            )
    honest = clients if factor == 1 else clients[1:]
    return _round(honest, server), _round([Adapter(out), *clients[1:]], server)


def difference(taken: Round, honest: Round) -> float:
    """Return the norm of two rounds' updates' difference over that of the honest one."""
    lost = total = 0.0
    for layer in honest.layers:
        ideal = _update(honest, layer)
        mine = _update(taken, layer)
        lost += norm(stack(mine, LowRank(-ideal.U_OP, ideal.V_PI))) ** 2
        total += norm(ideal) ** 2
    return (lost / total) ** 0.5


def _update(round: Round, layer: str) -> LowRank:
    """Return what the clients change of a layer, since the server's adapter."""
    pairs = LayerPairs(
        round.clients, layer, rank=round.rank, scaling=round.scaling, device=torch.device("cpu")
    )
    pieces = [*ideal_update(Clients(list(pairs), round.weights, round.scaling))]
    before = round.previous.pair(layer).float()
    return stack(*pieces, LowRank(-round.scaling * before.B_OR, before.A_RI))


def _round(clients: Sequence[Adapter], server: Adapter) -> Round:
    return Round(
        clients=clients,
        weights=[1 / len(clients)] * len(clients),
        previous=server,
        rank=server.rank,
        scaling=server.scaling,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start(
        __doc__,
        benchmark,
        clients={"type": int, "default": 10, "help": "in each round (%(default)s)"},
        rank={"type": int, "default": 8, "help": "of LoRA (%(default)s)"},
        rounds={"type": int, "default": 5, "help": "rounds (%(default)s)"},
        steps={"type": int, "default": 3, "help": "optimizer steps a client (%(default)s)"},
        layers={"type": int, "default": 4, "help": "decoder layers to adapt (%(default)s)"},
    )
