"""Every method on a small model, beside each other: a small reproduction of the paper's tables.

    .venv/bin/python benchmarks/methods.py [--model DIR] [--minutes 60] [--write] [--quick]

Works through settings, inits, seeds and methods, one cell after another, until the time is over;
the next call goes on from there, on this machine or another: each cell is one line of
benchmarks/results.jsonl (or of OUT/results.jsonl, where --out is given), with the verdict on every
test example. --write makes docs/results.md of what there is; tables of which no line is at hand
stay as they are. Settings: generated word problems, IID and Dirichlet, 1 and 3 rounds; with
FEDEX_SCALE_DATA set, real commonsense rows, IID and 1 round, and those of `kinds.py`. In a single
round methods that train both factors train the same clients, so that the clients of one run are
aggregated by each of them; and the exact methods end in one and the same model, whatever they do
next with its parts, so that fedex stands for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from common import start
from kinds import KINDS, overrides_of
from methods_page import (
    INITS,
    METHODS,
    ONE_INIT,
    REFERENCE,
    SEEDS,
    Sizes,
    as_markdown,
    differences_figure,
    read_rows,
    with_kept,
)

from fedex_scale.data.suites import DEFAULT_DATA_DIR
from fedex_scale.data.word_problems import generate, write_jsonl
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring.compare import read_verdicts

ROOT = Path(__file__).parents[1]
EXACT = ("fedex, reinit", "fedex, svd", "flora")  # as fedex, as long as there is one round
SUITES = "boolq piqa siqa hellaswag winogrande arc_easy arc_challenge openbookqa".split()
FOLDERS = {"siqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


@dataclass(frozen=True)
class Setting:
    name: str
    rounds: int
    overrides: tuple[str, ...]
    metric: str = ""
    """The only score that counts; none: all."""
    as_run: bool = False
    """Every method trains for itself, whatever the rounds."""


@dataclass(frozen=True)
class Group:
    """Cells that start from the same clients."""

    setting: Setting
    init: str
    seed: int
    methods: tuple[str, ...]

    def key(self, method: str) -> list:
        return [self.setting.name, self.init, self.seed, method]


def main(args: argparse.Namespace) -> None:
    began = time.monotonic()
    out = Path(args.out or f"runs/methods{'-quick' * args.quick}").resolve()
    sizes = Sizes(train=24, heldout=8, commonsense=24, suite=4) if args.quick else Sizes()
    model = args.model if not Path(args.model).exists() else str(Path(args.model).resolve())
    out.mkdir(parents=True, exist_ok=True)
    settings = make_settings(out, sizes, model)
    given = args.out or args.quick
    file = out / "results.jsonl" if given else ROOT / "benchmarks" / "results.jsonl"
    minutes = min(args.minutes, 8) if args.quick else args.minutes
    for group in groups(settings, quick=args.quick):
        done = [row["key"] for row in read_rows(file)]
        for method in group.methods:
            if group.key(method) in done or time.monotonic() - began > 60 * minutes:
                continue
            print(*group.key(method), sep=", ", flush=True)
            row = measure(group, method, out)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, separators=(",", ":")) + "\n")
        shutil.rmtree(out / "clients", ignore_errors=True)
    rows, page = read_rows(file), ROOT / "docs" / "results.md"
    text = as_markdown(rows, sizes, model)
    print(text)
    if args.write:
        differences_figure(rows, ROOT / "docs" / "images" / "methods.png")
        page.write_text(with_kept(text, page.read_text(encoding="utf-8")), encoding="utf-8")


def make_settings(out: Path, sizes: Sizes, model: str) -> list[Setting]:
    """Write the data and the config that every cell starts from, and return the settings."""
    train, heldout = generate(0, train=sizes.train, heldout=sizes.heldout)
    write_jsonl(train, out / "data" / "train.jsonl")
    write_jsonl(heldout, out / "data" / "word_problems" / "heldout.jsonl")
    config = {
        "run": {"dir": str(out), "overwrite": True},
        "model": {"path": model, "dtype": "float32"},
        "data": {"path": str(out / "data" / "train.jsonl"), "max_length": 256},
        "train": {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3},
        "evaluation": {
            "tasks": ["fedex_word_problems"],
            "data_dir": str(out / "data"),
            "before": False,
            "batch_size": 32,
        },
    }
    (out / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    uneven = ("partition.kind=dirichlet", "partition.column=type", "partition.alpha=0.5")
    uneven += (f"partition.min_examples={max(1, sizes.train // 12)}",)
    settings = [
        Setting(
            f"word problems, {name}, {rounds} round{'s' * (rounds > 1)}",
            rounds,
            (f"data.num_examples={count}", *overrides),
        )
        for rounds, count in sizes.rows.items()
        for name, overrides in (("IID", ()), ("Dirichlet 0.5", uneven))
    ]
    data_dir = Path(os.environ.get("FEDEX_SCALE_DATA") or DEFAULT_DATA_DIR).resolve()
    tasks = subsample(data_dir, out / "data", sizes.suite)
    if tasks:
        overrides = (
            f"data.path={data_dir}/commonsense/*/train.json",
            "data.schema=commonsense",
            f"data.num_examples={sizes.commonsense}",
            "data.select=random",
            "train.learning_rate=5e-4",
            f"evaluation.tasks={json.dumps(tasks)}",
        )
        settings.insert(1, Setting("commonsense, IID, 1 round", 1, overrides))
    if sizes == Sizes():
        settings += other_settings(data_dir, out)
    return settings


def other_settings(data_dir: Path, out: Path) -> list[Setting]:
    """Return the settings of other kinds that can be run here, and tell why others cannot."""
    settings = []
    models = Path(os.environ.get("FEDEX_SCALE_MODELS") or ROOT / "models")
    for kind in KINDS:
        try:
            chosen = overrides_of(kind, data_dir, models, out)
        except UserError as error:
            print(f"not run: {error}", file=sys.stderr)
        else:
            settings.append(Setting(kind.name, kind.rounds, chosen, kind.metric, as_run=True))
    return settings


def subsample(source: Path, target: Path, count: int) -> list[str]:
    """Copy a seeded draw of each suite's test rows, and return the tasks that there are."""
    tasks = []
    for suite in SUITES:
        name = Path("commonsense") / FOLDERS.get(suite, suite) / "test.json"
        if (source / name).is_file():
            rows = json.loads((source / name).read_text(encoding="utf-8"))
            rows = random.Random(0).sample(rows, min(count, len(rows)))
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(json.dumps(rows), encoding="utf-8")
            tasks.append(f"fedex_{suite}")
    return tasks


def groups(settings: Sequence[Setting], *, quick: bool) -> Iterator[Group]:
    """Yield what to do: every setting with one seed, before any with the next."""
    for seed in SEEDS[:1] if quick else SEEDS:
        for setting in settings[:1] if quick else settings:
            for init in INITS:
                names = ("fedit", "fedex") if quick else tuple(METHODS)
                left_out = ONE_INIT * (init != "shared") + EXACT * (setting.rounds == 1)
                yield Group(setting, init, seed, tuple(x for x in names if x not in left_out))


def measure(group: Group, method: str, out: Path) -> dict:
    """Do one cell and return its line: key, seconds, verdicts by score and example."""
    began = time.monotonic()
    overrides, options = METHODS[method]
    if group.setting.rounds == 1 and options is not None and not group.setting.as_run:
        results = aggregate_and_score(group, options, out)
    else:
        results = train(group, [f"method.name={method.split(',')[0]}", *overrides], out / "cell")
    verdicts = {
        name: values
        for name, values in read_verdicts(results).items()
        if name.endswith(f"/{group.setting.metric}") or not group.setting.metric
    }
    if not verdicts:
        raise UserError(f"{group.setting.name}: no {group.setting.metric} of its examples")
    shutil.rmtree(out / "cell", ignore_errors=True)
    return {
        "key": group.key(method),
        "seconds": round(time.monotonic() - began),
        "verdicts": {score: packed(list(values.values())) for score, values in verdicts.items()},
    }


def train(group: Group, overrides: Sequence[str], run: Path) -> Path:
    """Do a run, and return its directory."""
    chosen = [*group.setting.overrides, *overrides, f"federation.rounds={group.setting.rounds}"]
    chosen += [f"run.seed={group.seed}", f"federation.init={group.init}", f"run.name={run.name}"]
    call("run", "--config", run.parent / "config.yaml", *chosen)
    return run


def aggregate_and_score(group: Group, options: Sequence[str], out: Path) -> Path:
    """Aggregate the group's clients, which are trained if they are not there; return the scores."""
    run, cell = out / "clients", out / "cell"
    if not (run / "final").is_dir():
        train(group, ["method.name=fedit"], run)
    if options == METHODS[REFERENCE][1]:
        return run
    config = yaml.safe_load((run / "config.yaml").read_text())
    clients = sorted((run / "clients" / "round-0001").iterdir())
    counts = [json.loads((path / "client.json").read_text())["num_examples"] for path in clients]
    model, weights = config["model"]["path"], ",".join(map(str, counts))
    common = ["--base", model, "--out", cell, "--weights", weights, "--seed", group.seed]
    call("aggregate", *common, *options, *clients)
    section = config["evaluation"]
    suites = [word for task in section["tasks"] for word in ("--suite", task)]
    where = ["--data-dir", section["data_dir"], "--out", cell / "scores"]
    sizes = ["--batch-size", section["batch_size"], "--dtype", "float32"]
    call("evaluate", model, "--adapter", cell / "adapter", *suites, *where, *sizes)
    return cell / "scores"


def call(*arguments: object) -> None:
    command = [sys.executable, "-m", "fedex_scale.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"fedex-scale {arguments[0]}: {last}")


def packed(values: Sequence[float]) -> str | list[float]:
    """Return verdicts as a line holds them: 0 and 1 as a word of digits."""
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    start(
        __doc__,
        main,
        minutes={"type": float, "default": 10.0, "help": "start no cell after so many (10)"},
        out={"help": "where results.jsonl lies (runs/methods, or runs/methods-quick)"},
        write={"action": "store_true", "help": "write docs/results.md"},
    )
