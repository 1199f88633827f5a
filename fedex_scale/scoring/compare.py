"""`fedex-scale compare`: runs side by side on the same examples, with paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from fedex_scale.files import checked, kinds
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.text import cell

BOOTSTRAPS = 10_000
LEVEL = 0.95

Verdicts = dict[str, dict[str, float]]  # score -> example -> 0 or 1, or what the metric gives


@dataclass(frozen=True)
class Difference:
    """A run's score less the first run's, over the same examples."""

    score: str
    run: str
    num_examples: int
    mean: float
    """Of this run."""
    difference: float
    low: float
    high: float


def compare(paths: Sequence[Path]) -> list[Difference]:
    """Return every run's scores, and their differences to the first run's.

    Args:
        paths: run directories, of which the last evaluation counts, or directories of results.

    Raises:
        UserError: fewer than two, one without samples, or other examples than the first's.
    """
    if len(paths) < 2:
        raise UserError(f"compare: expected at least two runs, got {len(paths)}")
    runs = [read_verdicts(path) for path in paths]
    for path, run in zip(paths[1:], runs[1:], strict=True):
        _check_same(paths[0], runs[0], path, run)
    found = []
    for score, reference in runs[0].items():
        for path, run in zip(paths, runs, strict=True):
            values = np.array([run[score][example] for example in reference])
            change = values - np.array(list(reference.values()))
            low, high = interval(change)
            numbers = (len(values), values.mean(), change.mean(), low, high)
            found.append(Difference(score, str(path), *numbers))
    return found


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean.

    Resampling n values is drawing how often each distinct one comes, so that memory does not grow
    with n.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draw = np.random.default_rng(seed)
    resampled = draw.multinomial(len(values), counts / len(values), size=BOOTSTRAPS) @ distinct
    low, high = np.quantile(resampled / len(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def table(differences: Sequence[Difference]) -> Table:
    """Return the comparison for a terminal; the first run of each score is the reference."""
    shown = Table(box=None, pad_edge=False)
    for name in ("score", "run"):
        shown.add_column(name)
    for name in ("examples", "mean", "difference", f"{LEVEL:.0%} interval"):
        shown.add_column(name, justify="right")
    last = None
    for row in differences:
        cells = [row.score, row.run, str(row.num_examples), f"{row.mean:.2%}"]
        if row.score == last:
            cells += [f"{row.difference:+.2%}", f"{row.low:+.2%} to {row.high:+.2%}"]
            cells[0] = ""
        shown.add_row(*map(cell, cells))
        last = row.score
    return shown


def read_verdicts(path: Path) -> Verdicts:
    """Return the verdicts of a directory of results, or of a run's last evaluation."""
    places = [path, *sorted(path.glob("evaluations/round-*"), reverse=True)]
    places += sorted(path.glob("evaluations/scored*"))
    file = next((p / "samples.jsonl" for p in places if (p / "samples.jsonl").is_file()), None)
    if file is None:
        raise UserError(f"{path}: expected a scored run or its results, found no samples.jsonl")
    verdicts: Verdicts = defaultdict(dict)
    for number, line in enumerate(door.read_lines(file, inside=file.parent), start=1):
        where = f"{file}: line {number}"
        try:
            tree = door.parse_json(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); score again") from None
        sample = checked.check(kinds.SampleLine, tree, where, "score again")
        example = f"{sample.doc_id} {sample.doc_hash}"
        for metric, value in sample.verdict.items():
            if isinstance(value, float):  # counts, such as unparsed_gold, are whole numbers
                rule = "" if sample.filter == "none" else f"/{sample.filter}"
                verdicts[f"{sample.task}/{metric}{rule}"][example] = value
    if not verdicts:
        raise UserError(f"{file}: expected a verdict, found none; score again")
    return dict(verdicts)


def _check_same(first: Path, one: Verdicts, second: Path, other: Verdicts) -> None:
    for score in sorted(one.keys() | other.keys()):
        examples = [run.get(score, {}).keys() for run in (one, other)]
        if examples[0] != examples[1]:
            task, shared = score.split("/")[0], len(examples[0] & examples[1])
            raise UserError(
                f"task {task}: expected the same examples, got {len(examples[0])} in {first} and "
                f"{len(examples[1])} in {second}, {shared} of them alike; score both alike"
            )
