"""The paper's three ablations on a small model: rank, assignment, and how far averaging deviates.

    .venv/bin/python benchmarks/sweeps.py --sweep rank         # 1 to 32, FedIT beside FedEx
    .venv/bin/python benchmarks/sweeps.py --sweep assignment   # average and reinit
    .venv/bin/python benchmarks/sweeps.py --sweep deviation    # depth, rounds, epochs, Q and V

Runs classification of QNLI by MiniLM-L6 (`kinds.py`), which stands for the paper's RoBERTa; with
--config another YAML, such as roberta_base_glue. Each run is a line of benchmarks/sweeps.jsonl, and
the next call goes on from there; --minutes ends it early. The paper's figures stand beside ours.
Source: Singhal et al., arXiv:2410.09432, section 6.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from common import start
from kinds import KINDS, overrides_of
from methods import call
from rich.console import Console
from rich.table import Table

from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting import record
from fedex_scale.reporting.deviations import observations

ROOT = Path(__file__).parents[1]
SWEEPS = {
    "rank": (1, 2, 4, 8, 16, 32),
    "assignment": ("average", "reinit"),
    "deviation": (1, 3, 10),  # local epochs
}
ROUNDS = 3
PAPER = {
    "average": "84.39",
    "reinit": "53.46",
    "keep": "78.41",
    "Q over V": "above 1",
    "deeper half over shallower half": "below 1",
    "last round over first": "below 1",
}
"""Of RoBERTa-base at rank 4: GLUE's mean by assignment; what it says of deviations."""


class Case(NamedTuple):
    """One run of a sweep."""

    sweep: str
    name: str
    overrides: tuple[str, ...]


def cases(sweep: str, *, quick: bool) -> Iterator[Case]:
    """Yield the runs of a sweep."""
    for value in SWEEPS[sweep][: 2 if quick else None]:
        if sweep == "rank":
            for method in ("fedit", "fedex"):
                yield Case(sweep, f"{method}, r {value}", (f"method.name={method}", _rank(value)))
        elif sweep == "assignment":
            yield Case(sweep, value, (f"method.assign={value}",))
        else:
            yield Case(sweep, f"{value} local epochs", (f"train.local_epochs={value}",))


def _rank(rank: int) -> str:
    return f"lora={json.dumps({'rank': rank, 'alpha': 8, 'target_modules': ['query', 'value']})}"


def main(args: argparse.Namespace) -> None:
    began, out = time.monotonic(), Path(args.out or "runs/sweeps").resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = Path(args.lines or ROOT / "benchmarks" / "sweeps.jsonl")
    config, common = _setting(args, out)
    for case in cases(args.sweep, quick=args.quick):
        done = {(line["sweep"], line["name"]) for line in read(file)}
        if (case.sweep, case.name) in done or time.monotonic() - began > 60 * args.minutes:
            continue
        print(f"{case.sweep}: {case.name}", file=sys.stderr, flush=True)
        line = measure(case, config, common, out)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line, separators=(",", ":")) + "\n")
    Console().print(shown(args.sweep, read(file)))
    print(json.dumps({"benchmark": "sweeps", "sweep": args.sweep, "lines": len(read(file))}))


def _setting(args: argparse.Namespace, out: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the config to start from, and what is changed in it for every run."""
    rounds = (f"federation.rounds={2 if args.quick else ROUNDS}",)
    if args.config:
        return Path(args.config), rounds
    data_dir = os.environ.get("FEDEX_SCALE_DATA")
    models = Path(os.environ.get("FEDEX_SCALE_MODELS") or ROOT / "models")
    chosen = overrides_of(KINDS[0], Path(data_dir) if data_dir else None, models, out)
    path = out / "config.yaml"
    config = {"model": {"path": ".", "dtype": "float32"}, "data": {"path": "."}}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path, (*chosen, *rounds)


def measure(case: Case, config: Path, common: tuple[str, ...], out: Path) -> dict:
    """Do one run; return its last scores, and the quotients and norm of its deviation."""
    place = (f"run.dir={out}", "run.name=case", "run.overwrite=true", "evaluation.before=false")
    call("run", "--config", config, *common, *case.overrides, *place)
    tree = record.gather(RunDir(out / "case"))
    last = max(score["round"] for score in tree["scores"])
    totals = [round["deviation"]["total"] for round in tree["rounds"]]
    return {
        "sweep": case.sweep,
        "name": case.name,
        "scores": {
            f"{score['task']}/{score['metric']}": round(score["value"], 4)
            for score in tree["scores"]
            if score["round"] == last
        },
        "deviation": [total["scaled"] if total else None for total in totals],
        "quotients": {name: round(value, 3) for name, value in observations(tree).items()},
        "seconds": round(tree["seconds"]),
    }


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def shown(sweep: str, lines: list[dict]) -> Table:
    """Return a sweep as a table, the paper's figures beside ours."""
    own = [line for line in lines if line["sweep"] == sweep]
    table = Table(box=None, pad_edge=False)
    table.add_column(sweep)
    if sweep == "deviation":
        names = [name for name in PAPER if any(name in line["quotients"] for line in own)]
        for column in ("scaled norm, by round", *(f"{x} (paper: {PAPER[x]})" for x in names)):
            table.add_column(column, justify="right")
        for line in own:
            norms = ", ".join(f"{x:.2e}" for x in line["deviation"] if x is not None)
            table.add_row(line["name"], norms, *(str(line["quotients"].get(x)) for x in names))
        return table
    metrics = list(dict.fromkeys(name for line in own for name in line["scores"]))
    for column in (*metrics, "paper, GLUE's mean"):
        table.add_column(column, justify="right")
    for line in own:
        scores = [f"{line['scores'].get(name, float('nan')):.4f}" for name in metrics]
        table.add_row(line["name"], *scores, PAPER.get(line["name"], ""))
    if sweep == "assignment":
        table.add_row("keep", *["not run"] * len(metrics), PAPER["keep"])
    return table


if __name__ == "__main__":
    start(
        __doc__,
        main,
        sweep={"choices": tuple(SWEEPS), "required": True},
        config={"help": "a YAML or a recipe to sweep over instead"},
        minutes={"type": float, "default": 30.0, "help": "start no run after so many (30)"},
        lines={"help": "where the lines are (benchmarks/sweeps.jsonl)"},
        out={"help": "where the runs are (runs/sweeps)"},
    )
