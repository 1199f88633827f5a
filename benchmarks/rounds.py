"""What the forward pass keeps over many rounds, and what it costs, for every way to fold.

    python benchmarks/rounds.py [--rounds 20] [--clients 3,10] [--inits shared,per_client]
                                [--rank 32] [--steps 3] [--layers 2] [--out DIR] [--quick]

Clients train on word problems, from one A for all and from one each, in float32, where every fold
is exact. Their adapters are then aggregated anew in bfloat16 in every way, on the same model,
without training. Of a few decoder layers, as the spectra of all take hours.

A first table tells how many columns the sum of all residuals needs, the second what is kept.
--out also draws them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from common import describe_machine, start
from transformers import AutoConfig

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.data.word_problems import generate, write_jsonl
from fedex_scale.engine.contents import fold_targets
from fedex_scale.engine.lora_model import SIDE
from fedex_scale.federation import server
from fedex_scale.federation.client import show
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import LowRank, norm, singular_values, stack
from fedex_scale.run import engine_for, run_config

ALPHA = 16
PROJECTIONS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj".split()
PROJECTIONS += "mlp.gate_proj mlp.up_proj mlp.down_proj".split()
TOLERANCES = (0.1, 0.01, 0.001)
FOLDS = {
    "side": [],
    "side, one round's columns": ["aggregate.side_rank=ONE"],
    "side, tolerance 0.1": ["aggregate.side_tolerance=0.1"],
    "planes": ["aggregate.fold=planes"],
    "carry": ["aggregate.fold=carry"],
    "round": ["aggregate.fold=round"],
}


def benchmark(args: argparse.Namespace) -> None:
    number = 2 if args.quick else args.rounds
    clients = [2] if args.quick else [int(word) for word in args.clients.split(",")]
    settings = f"{args.model}, rank {args.rank}, alpha {ALPHA}, lr 5e-4, {args.steps} steps of 4"
    print(f"{settings}\n{describe_machine()}\n", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for num_clients in clients:
            for init in args.inits.split(","):
                config = write_config(args, scratch, num_clients, init, number)
                run_config(config, [])
                case = {"clients": num_clients, "init": init}
                rows += [case | row for row in ranks(config)]
                for fold, options in FOLDS.items():
                    one = str((num_clients - 1) * args.rank)
                    options = [option.replace("ONE", one) for option in options]
                    rows += [case | {"fold": fold} | row for row in replay(config, options)]
                if args.out:
                    write(Path(args.out), settings, rows)
    for title, table in tables(rows).items():
        print(f"{title}\n\n{table}\n")
    print(json.dumps({"benchmark": "rounds", "settings": settings, "rows": rows}))


def write_config(
    args: argparse.Namespace, scratch: Path, clients: int, init: str, rounds: int
) -> Path:
    """Write the config of a run whose folds are exact, and its data."""
    data = scratch / "train.jsonl"
    write_jsonl(generate(0, train=400, heldout=1)[0], data)
    depth = AutoConfig.from_pretrained(args.model).num_hidden_layers
    number = 1 if args.quick else args.layers
    layers = [depth * (2 * i + 1) // (2 * number) for i in range(number)]  # evenly spread
    config = {
        "run": {"name": f"{init}-{clients}", "dir": str(scratch), "save_steps": None},
        "model": {"path": args.model, "dtype": "float32"},
        "lora": {
            "rank": 4 if args.quick else args.rank,
            "alpha": ALPHA,
            "target_modules": [f"layers.{i}.{name}" for i in layers for name in PROJECTIONS],
        },
        "data": {"path": str(data), "schema": "metamath", "max_length": 256},
        "partition": {"num_clients": clients},
        "federation": {"init": init, "rounds": rounds},
        "aggregate": {"fold": "round"},
        "train": {
            "batch_size": 4,
            "micro_batch_size": 4,
            "learning_rate": 5e-4,
            "max_steps": args.steps,
        },
    }
    file = scratch / f"{init}-{clients}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def ranks(config: Path) -> Iterator[dict[str, Any]]:
    """Yield, by round, the columns that the sum of all residuals needs to lose so much of the last.

    The median and the largest of the layers.
    """
    run = RunDir(load_config(config).run.path)
    last = len(list(run.path.glob("server/round-*"))) - 1
    parts = [Adapter(run.residual(number)) for number in range(1, last + 1)]
    for number in range(1, last + 1):
        if number > 2 and number % 2:
            continue
        found: dict[float, list[int]] = {share: [] for share in TOLERANCES}
        columns = 0
        for layer in parts[0].layers:
            terms = [LowRank(*part.pair(layer)[::-1]) for part in parts[:number]]
            new, whole = terms[-1], stack(*terms)
            columns = whole.V_PI.shape[0]
            squares = singular_values(whole).square().flip(0).cumsum(0).flip(0).sqrt()
            for share, needed in found.items():
                needed.append(int(squares.gt(share * norm(new)).sum()))
        row: dict[str, Any] = {"round": number, "columns": columns}
        for share, needed in found.items():
            needed.sort()
            row[f"{share:g}"] = [needed[len(needed) // 2], needed[-1]]
        yield row


def replay(config: Path, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Aggregate a run's clients anew in bfloat16; yield what each round kept, and its cost."""
    own = load_config(config, ["model.dtype=bfloat16", "aggregate.fold=side", *options])
    trained = RunDir(load_config(config).run.path)
    with tempfile.TemporaryDirectory() as name:
        run = RunDir(Path(name))
        clients = range(own.partition.num_clients)
        (run.path / "clients").symlink_to(trained.path / "clients")
        engine = engine_for(own, len(clients))
        targets = fold_targets(engine)
        server.draw_adapter(own, engine, run)
        state = ServerState()
        for number in range(1, own.federation.rounds + 1):
            began = time.perf_counter()
            weights = [1 / len(clients)] * len(clients)
            state, report = server.aggregate_round(
                own, engine, targets, clients, weights, run, state
            )
            show(engine, run, state)
            seconds = time.perf_counter() - began
            yield {
                "round": number,
                "kept": report.kept,
                "kept_of_all": report.kept_of_all,
                "columns": report.side_rank,
                "fold_s": seconds,
                "bytes": _beside(own, engine, targets),
            }


def _beside(config: Config, engine: Any, targets: Any) -> int:
    """Return the memory that a fold keeps beside the model."""
    held = sum(target.carry.nbytes for target in targets.values() if target.carry is not None)
    if config.aggregate.fold in ("side", "planes"):
        for layer in engine.layers.values():
            held += layer.lora_A[SIDE].weight.nbytes + layer.lora_B[SIDE].weight.nbytes
    return held


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the tables by their titles, in Markdown."""
    found = {}
    for clients, init in dict.fromkeys((row["clients"], row["init"]) for row in rows):
        mine = [row for row in rows if (row["clients"], row["init"]) == (clients, init)]
        title = f"{clients} clients, init: {init}"
        needed = [row for row in mine if "fold" not in row]
        head = ["round", "all columns", *(f"{100 * share:g}%" for share in TOLERANCES)]
        body = [
            [row["round"], row["columns"], *("{}, {}".format(*row[f"{x:g}"]) for x in TOLERANCES)]
            for row in needed
        ]
        found[f"{title}: columns needed, median and largest layer"] = _markdown(head, body)
        shown = [row["round"] for row in needed]
        head = ["fold", "", *map(str, shown), "fold, s: first, last", "MB beside the model"]
        body = []
        for fold in FOLDS:
            of_fold = [row for row in mine if row.get("fold") == fold]
            times = f"{of_fold[0]['fold_s']:.1f}, {of_fold[-1]['fold_s']:.1f}"
            size = f"{of_fold[-1]['bytes'] / 1e6:,.0f}"
            for what in ("kept", "kept_of_all"):
                values = [_percent(r[what]) for r in of_fold if r["round"] in shown]
                first = what == "kept"
                label = [fold, "of the round"] if first else ["", "of all rounds"]
                body.append([*label, *values, *((times, size) if first else ("", ""))])
        found[f"{title}: kept in the forward pass, bfloat16, %"] = _markdown(head, body)
    return found


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _markdown(head: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(out: Path, settings: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write what there is so far: the rows, the tables and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"**{title}**\n\n{table}" for title, table in tables(rows).items())
    (out / "rounds.md").write_text(f"{settings}\n{describe_machine()}\n\n{text}\n")
    (out / "rounds.json").write_text(json.dumps(rows) + "\n")
    draw(rows, out / "rounds.png")


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw what is kept of all rounds' residuals, a panel a case."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from fedex_scale.reporting.chart import MARKERS, SERIES, STYLE

    cases = list(dict.fromkeys((row["clients"], row["init"]) for row in rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * min(2, len(cases)), 3.2 * -(-len(cases) // 2)), dpi=150)
        panels = figure.subplots(-(-len(cases) // 2), min(2, len(cases)), squeeze=False)
        for panel, (clients, init) in zip(panels.flat, cases, strict=False):
            for fold, color, marker in zip(FOLDS, SERIES, MARKERS, strict=False):
                line = [
                    (row["round"], 100 * (row["kept_of_all"] or 0.0))
                    for row in rows
                    if (row["clients"], row["init"], row.get("fold")) == (clients, init, fold)
                ]
                panel.plot(*zip(*line, strict=True), color=color, marker=marker, label=fold)
            panel.set(title=f"{clients} clients, init: {init}", xlabel="round", ylim=(-3, 103))
            panel.set_ylabel("% of all residuals seen")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        names, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(names, labels, loc="outside lower center", ncols=3)
        figure.set_layout_engine("constrained")
        figure.savefig(file)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start(
        __doc__,
        benchmark,
        rounds={"type": int, "default": 20, "help": "rounds (%(default)s)"},
        clients={"default": "3,10", "help": "numbers of clients (%(default)s)"},
        rank={"type": int, "default": 32, "help": "of LoRA (%(default)s)"},
        inits={"default": "shared,per_client", "help": "where A comes from (%(default)s)"},
        steps={"type": int, "default": 3, "help": "optimizer steps a client (%(default)s)"},
        layers={"type": int, "default": 2, "help": "decoder layers to adapt (%(default)s)"},
        out={"help": "directory for rounds.md, rounds.json and rounds.png"},
    )
