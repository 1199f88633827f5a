"""Every method on a small model, beside each other: a small reproduction of the paper's tables.

    .venv/bin/python benchmarks/methods.py [--model DIR] [--minutes 60] [--write] [--quick]

Works through settings, inits, seeds and methods, one cell after another, until the time is over;
the next call goes on from there. Each cell is one line of OUT/results.jsonl, with the verdict on
every test example. --write makes docs/results.md of what there is. Settings: generated word
problems, IID and Dirichlet, 1 and 3 rounds; with FEDEX_SCALE_DATA set, real commonsense rows, IID
and 1 round. In a single round methods that train both factors train the same clients, so that the
clients of one run are aggregated by each of them; and the exact methods end in one and the same
model, whatever they do next with its parts, so that fedex stands for all of them.
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
from statistics import mean

import numpy as np
import yaml
from common import start

from fedex_scale.data.suites import DEFAULT_DATA_DIR
from fedex_scale.data.word_problems import generate, write_jsonl
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring.compare import interval, read_verdicts

ROOT = Path(__file__).parents[1]
# By name: the overrides of a run, and the options of `fedex-scale aggregate` where it can do it.
METHODS: dict[str, tuple[list[str], list[str] | None]] = {
    "fedit": ([], ["--method", "fedit"]),
    "fedex": ([], ["--method", "fedex"]),
    "fedex, svd_rank 16": (["method.svd_rank=16"], ["--method", "fedex", "--svd-rank", "16"]),
    "fedex, reinit": (["method.assign=reinit"], ["--method", "fedex", "--assign", "reinit"]),
    "fedex, svd": (["method.assign=svd"], ["--method", "fedex", "--assign", "svd"]),
    "flora": ([], ["--method", "flora"]),
    "flexlora": ([], ["--method", "flexlora"]),
    "lora_fair": ([], ["--method", "lora_fair"]),
    "ffa": ([], None),
    "centralized": ([], None),
}
REFERENCE = "fedit"
EXACT = ("fedex, reinit", "fedex, svd", "flora")  # as fedex, as long as there is one round
ONE_INIT = ("ffa", "centralized")  # a frozen A is shared; a single client has one draw
INITS, SEEDS = ("shared", "per_client"), (0, 1, 2)
SUITES = "boolq piqa siqa hellaswag winogrande arc_easy arc_challenge openbookqa".split()
FOLDERS = {"siqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows to train and to test on; of commonsense, test rows of each suite."""

    train: int = 336
    heldout: int = 128
    commonsense: int = 450
    suite: int = 50

    @property
    def rows(self) -> dict[int, int]:
        """Rows of word problems, by rounds: half of them where every round passes over them."""
        return {1: self.train, 3: self.train // 2}


@dataclass(frozen=True)
class Setting:
    name: str
    rounds: int
    overrides: tuple[str, ...]


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
    file, minutes = out / "results.jsonl", min(args.minutes, 8) if args.quick else args.minutes
    for group in groups(settings, quick=args.quick):
        done = [row["key"] for row in read_rows(file)]
        for method in group.methods:
            if group.key(method) in done or time.monotonic() - began > 60 * minutes:
                continue
            print(*group.key(method), sep=", ", flush=True)
            row = measure(group, method, out)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        shutil.rmtree(out / "clients", ignore_errors=True)
    text = as_markdown(read_rows(file), sizes, model)
    print(text)
    if args.write:
        (ROOT / "docs" / "results.md").write_text(text, encoding="utf-8")


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
    if group.setting.rounds == 1 and options is not None:
        results = aggregate_and_score(group, options, out)
    else:
        results = train(group, [f"method.name={method.split(',')[0]}", *overrides], out / "cell")
    verdicts = read_verdicts(results)
    shutil.rmtree(out / "cell", ignore_errors=True)
    return {
        "key": group.key(method),
        "seconds": round(time.monotonic() - began),
        "verdicts": {score: list(values.values()) for score, values in verdicts.items()},
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


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def as_markdown(rows: Sequence[dict], sizes: Sizes, model: str) -> str:
    """Return docs/results.md: a table a setting, with differences to FedIT and their intervals."""
    lines = [
        "# Methods beside each other",
        "",
        f"{Path(model).name}, rank 32, alpha 16, float32, AdamW, 3 clients, one local epoch a "
        f"round, batch 8. Word problems: {sizes.rows[1]} generated rows ({sizes.rows[3]} with 3 "
        f"rounds), learning rate 1e-3, tested on {sizes.heldout} others. Commonsense: "
        f"{sizes.commonsense} real rows of Commonsense170K (BoolQ, ARC, OpenBookQA), learning "
        "rate 5e-4, tested on a fixed draw of at most "
        f"{sizes.suite} rows of each test set at hand; the score is the mean over the sets. "
        "`shared`: all clients start from one A; `per_client`: from draws of their own, as in "
        "the paper's public code. After a single round the exact methods (fedex with any "
        "assignment, flora) hold one and the same model, the base plus the mean of the products: "
        "fedex stands for them.",
        "",
        "Difference: to FedIT from the same start, in points, on the same examples and seeds, with "
        "a 95% bootstrap interval over examples. An interval that holds 0 is no evidence of a "
        "difference; with few seeds it says nothing of other seeds either.",
        "",
        "Made by `python benchmarks/methods.py --write`, which goes on where it was stopped.",
    ]
    for setting in dict.fromkeys(row["key"][0] for row in rows):
        lines += ["", f"## {setting}", "", "| init | method | score | seeds | difference |"]
        lines.append("|---|---|---|---|---|")
        for init in INITS:
            for method in METHODS:
                lines += _line(rows, setting, init, method)
    return "\n".join(lines) + "\n"


def _line(rows: Sequence[dict], setting: str, init: str, method: str) -> list[str]:
    """Return a method's line, or nothing where no seed is there yet."""
    own = _by_seed(rows, setting, init, method)
    reference = _by_seed(rows, setting, init, REFERENCE)
    if not own:
        return []
    score = mean(mean(map(mean, verdicts.values())) for verdicts in own.values())
    both = sorted(own.keys() & reference.keys())
    shown = ""
    if method != REFERENCE and both:
        change = np.concatenate([_values(own[seed]) - _values(reference[seed]) for seed in both])
        low, high = interval(change)
        shown = f"{100 * change.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [f"| {init} | {method} | {score:.1%} | {len(own)} | {shown} |"]


def _by_seed(rows: Sequence[dict], setting: str, init: str, method: str) -> dict[int, dict]:
    found = (row for row in rows if row["key"][:2] == [setting, init] and row["key"][3] == method)
    return {row["key"][2]: row["verdicts"] for row in found}


def _values(verdicts: dict[str, list[float]]) -> np.ndarray:
    """Return the verdicts, weighted so that their mean is the mean over the test sets."""
    total = sum(map(len, verdicts.values()))
    return np.concatenate(
        [np.array(x) * total / (len(verdicts) * len(x)) for x in verdicts.values()]
    )


if __name__ == "__main__":
    start(
        __doc__,
        main,
        minutes={"type": float, "default": 10.0, "help": "start no cell after so many (10)"},
        out={"help": "where results.jsonl lies (runs/methods, or runs/methods-quick)"},
        write={"action": "store_true", "help": "write docs/results.md"},
    )
