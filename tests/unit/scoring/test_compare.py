"""Paired comparisons of scored runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring.compare import compare, interval, read_verdicts, table


def write(directory: Path, verdicts: list[float], *, task: str = "t", first: int = 0) -> Path:
    """Write samples as an evaluation does."""
    directory.mkdir(parents=True)
    with (directory / "samples.jsonl").open("w") as file:
        for number, verdict in enumerate(verdicts, first):
            sample = {"task": task, "filter": "none", "doc_id": number, "doc_hash": f"#{number}"}
            sample["verdict"] = {"exact_match": verdict, "unparsed_gold": 0}
            file.write(json.dumps(sample) + "\n")
    return directory


def test_differences_are_paired_and_seeded(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    one = (draw.random(400) < 0.5).astype(float).tolist()
    other = [1.0 if index < 40 else value for index, value in enumerate(one)]
    paths = [write(tmp_path / "a", one), write(tmp_path / "b", other)]
    first, second = compare(paths)
    assert (first.difference, first.low, first.high) == (0, 0, 0)
    assert second.score == "t/exact_match"
    assert second.num_examples == 400
    assert second.mean == np.mean(other)
    assert second.difference == pytest.approx(np.mean(other) - np.mean(one))
    assert 0 < second.low < second.difference < second.high
    assert compare(paths) == [first, second]
    cells = [list(column.cells) for column in table([first, second]).columns]
    assert list(map(str, cells[0])) == ["t/exact_match", ""]
    assert str(cells[4][1]).startswith("+")


def test_interval_is_that_of_plain_resampling() -> None:
    values = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], size=150, p=[0.1, 0.6, 0.3])
    draw = np.random.default_rng(3)
    means = values[draw.integers(0, 150, (10_000, 150))].mean(1)
    assert interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


def test_the_last_evaluation_of_a_run_counts(tmp_path: Path) -> None:
    for number, verdict in enumerate((0.0, 0.0, 1.0)):
        write(tmp_path / "evaluations" / f"round-000{number}", [verdict])
    assert read_verdicts(tmp_path) == {"t/exact_match": {"0 #0": 1.0}}


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = write(tmp_path / "a", [0.0, 1.0])
    with pytest.raises(UserError, match="at least two runs, got 1"):
        compare([one])
    with pytest.raises(UserError, match=r"found no samples\.jsonl"):
        compare([one, tmp_path])
    with pytest.raises(UserError, match=r"task t: expected the same .*, got 2 in .*1 of them"):
        compare([one, write(tmp_path / "shifted", [0.0, 1.0], first=1)])
    with pytest.raises(UserError, match=r"task t: .* 0 in .*other"):
        compare([one, write(tmp_path / "other", [0.0, 1.0], task="u")])


@pytest.mark.parametrize("line", ["{", "[" * 100_000, "3", '{"doc_id": 1}'], ids=lambda x: x[:9])
def test_damaged_samples_are_named(tmp_path: Path, line: str) -> None:
    whole = write(tmp_path / "a", [1.0])
    (write(tmp_path / "b", [1.0]) / "samples.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"samples.jsonl: line 1.*; score again") as caught:
        compare([whole, tmp_path / "b"])
    assert len(str(caught.value)) < 500
