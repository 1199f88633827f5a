"""docs/results.md from the lines that `methods.py` measured: tables, differences, a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from kinds import KINDS, NOT_HERE

from fedex_scale.scoring.compare import interval

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
INITS = ("shared", "per_client")
SEEDS = (0, 1, 2)
ONE_INIT = ("ffa", "centralized")  # a frozen A is shared; a single client has one draw
NOT_RUN = "## Not run here"


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


def read_rows(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []
    for row in rows:
        row["verdicts"] = {k: [float(x) for x in own] for k, own in row["verdicts"].items()}
    return rows


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
        "a 95% bootstrap interval over examples, and over seeds as well where a table's lines are "
        "in `benchmarks/results.jsonl`. An interval that holds 0 is no evidence of a difference; "
        "one seed says nothing of others.",
        "",
        "Made by `python benchmarks/methods.py --write`, which goes on where it was stopped.",
    ]
    names = {kind.name: kind for kind in KINDS}
    for setting in dict.fromkeys(row["key"][0] for row in rows):
        lines += ["", f"## {setting}", ""]
        if setting in names:
            kind, took = (
                names[setting],
                [row["seconds"] for row in rows if row["key"][0] == setting],
            )
            lines += [
                f"Stands for `{kind.recipe}`; the score is the mean of {kind.metric}. A method "
                f"took {np.median(took) / 60:.1f} minutes on one core.",
                "",
            ]
        lines += ["| init | method | score | seeds | difference |"]
        lines.append("|---|---|---|---|---|")
        for init in INITS:
            for method in METHODS:
                lines += _line(rows, setting, init, method)
    lines += ["", NOT_RUN, "", "Each has a recipe; its weights or rows need the hub.", ""]
    cells = len(SEEDS) * (2 * len(METHODS) - len(ONE_INIT))
    hours = sum(kind.minutes for kind in KINDS) * cells / 60
    lines += [
        "What stands for them on one core (`benchmarks/kinds.py`) is part of the same command, "
        f"where FEDEX_SCALE_DATA has the rows: {cells} cells a setting, {hours:.0f} hours in all "
        "as extrapolated from trials. A setting without a table above has not been run yet.",
        "",
    ]
    lines += ["| experiment | recipe | |", "|---|---|---|"]
    lines += [f"| {what} | `{recipe}` | not run here |" for what, recipe in NOT_HERE.items()]
    return "\n".join(lines) + "\n"


def with_kept(text: str, old: str) -> str:
    """Return the page, with the old one's tables of settings that the new one does not have."""
    parts = {x.split("\n", 1)[0]: x for x in old.split("\n## ")[1:]}
    new = {x.split("\n", 1)[0] for x in text.split("\n## ")[1:]}
    kept = "".join(f"\n## {x.rstrip()}\n" for name, x in parts.items() if name not in new)
    before, end = text.split(f"\n{NOT_RUN}")
    return f"{before}{kept}\n{NOT_RUN}{end}"


def differences_figure(rows: Sequence[dict], path: Path) -> None:
    """Draw the difference to FedIT with its interval, a line a cell."""
    from matplotlib.figure import Figure

    lines = []
    for setting in dict.fromkeys(row["key"][0] for row in rows):
        for init in INITS:
            for method in METHODS:
                found = difference(rows, setting, init, method)
                if found is not None:
                    lines.append((f"{setting}, {init}: {method}", *found))
    if not lines:
        return
    figure = Figure(figsize=(9, 1 + 0.22 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for i, (_, middle, low, high) in enumerate(lines):
        color = "C0" if low <= 0 <= high else "C3"
        axes.plot([100 * low, 100 * high], [i, i], color=color)
        axes.plot(100 * middle, i, "o", color=color, markersize=4)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("difference to FedIT in points, with a 95% interval")
    figure.savefig(path, dpi=110)


def _line(rows: Sequence[dict], setting: str, init: str, method: str) -> list[str]:
    """Return a method's line, or nothing where no seed is there yet."""
    own = _by_seed(rows, setting, init, method)
    if not own:
        return []
    score = mean(mean(map(mean, verdicts.values())) for verdicts in own.values())
    shown, found = "", difference(rows, setting, init, method)
    if found is not None:
        middle, low, high = found
        shown = f"{100 * middle:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [f"| {init} | {method} | {score:.1%} | {len(own)} | {shown} |"]


def difference(
    rows: Sequence[dict], setting: str, init: str, method: str
) -> tuple[float, float, float] | None:
    """Return the paired difference to FedIT and its interval; None without a seed of both."""
    own, reference = (_by_seed(rows, setting, init, name) for name in (method, REFERENCE))
    both = sorted(own.keys() & reference.keys())
    if method == REFERENCE or not both:
        return None
    changes = [_values(own[seed]) - _values(reference[seed]) for seed in both]
    middle = float(np.mean([change.mean() for change in changes]))
    return middle, *(interval(changes[0]) if len(both) == 1 else over_seeds(changes))


def over_seeds(changes: Sequence[np.ndarray], *, draws: int = 4000) -> tuple[float, float]:
    """Return the bootstrap interval of a mean over seeds of means over examples: both are drawn."""
    draw = np.random.default_rng(0)
    means = np.stack([draw.choice(change, (draws, len(change))).mean(axis=1) for change in changes])
    chosen = draw.integers(len(changes), size=(len(changes), draws))
    drawn = np.take_along_axis(means, chosen, axis=0).mean(axis=0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _by_seed(rows: Sequence[dict], setting: str, init: str, method: str) -> dict[int, dict]:
    found = (row for row in rows if row["key"][:2] == [setting, init] and row["key"][3] == method)
    return {row["key"][2]: row["verdicts"] for row in found}


def _values(verdicts: dict[str, list[float]]) -> np.ndarray:
    """Return the verdicts, weighted so that their mean is the mean over the test sets."""
    total = sum(map(len, verdicts.values()))
    return np.concatenate(
        [np.array(x) * total / (len(verdicts) * len(x)) for x in verdicts.values()]
    )
