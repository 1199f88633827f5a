"""Each benchmark measures a tiny model, and its last line holds what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heads import write_head_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def run(name: str, model: Path | str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", "--model", model, "--quick", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def measured(name: str, model: Path) -> dict:
    done = run(name, model)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    assert all(figure["median"] > 0 for figure in result["figures"].values())
    for ratio in result["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    return result


def test_client_switch(tiny_llama: Path) -> None:
    ratios = measured("client_switch", tiny_llama)["ratios"]
    assert ratios["anew / switch"]["goal"].startswith("goal >= 20: ")


def test_deviation(tiny_llama: Path) -> None:
    ratios = measured("deviation", tiny_llama)["ratios"]
    assert ratios["deviation / 43 steps"]["goal"].startswith("goal <= 0.01: ")


def test_throughput_of_the_same_training_with_the_same_losses(tiny_llama: Path) -> None:
    result = measured("throughput", tiny_llama)
    assert len(result["losses"]) == 3
    # The Trainer does the very same float32 operations; padding changes the order of sums.
    assert result["largest_loss_difference"]["Trainer + PEFT"] < 1e-6
    assert result["largest_loss_difference"]["ours, padded to 64"] < 1e-4


def test_host_memory(tiny_llama: Path) -> None:
    figures = measured("host_memory", tiny_llama)["figures"]
    assert list(figures) == ["3 clients", "6 clients"]


def test_generation_writes_what_lm_eval_writes(tiny_llama: Path) -> None:
    ratios = measured("generation", tiny_llama)["ratios"]
    assert ratios["ours / lm-eval"]["goal"].startswith("goal <= 1.05: ")


@pytest.mark.slow
def test_methods_go_on_where_they_were_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--out", str(tmp_path / "out"))
    first = run("methods", tiny_llama, *options, "--minutes", "0.1")
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert 1 <= len(rows) < 4
    second = run("methods", tiny_llama, *options)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "out" / "results.jsonl").read_text().splitlines()[: len(rows)] == rows
    page = second.stdout.partition("## Not run here")[0]
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1:3] for line in table[1:]] == [
        [f" {init} ", f" {method} "]
        for init in ("shared", "per_client")
        for method in ("fedit", "fedex")
    ]


def test_gpu_measures_every_part(tmp_path: Path) -> None:
    result = measured("gpu", tmp_path)
    assert not result["not_measured"]
    assert result["ratios"]["tiny: ours / trainer, tokens/s"]["goal"].startswith("goal >= 1.25: ")
    figures = {"fold: carry", "client switch", "tokens with the side adapter"}
    assert {f"tiny, ours: {name}" for name in figures} <= set(result["figures"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_gpu_says_where_there_is_none(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no CUDA device here" in done.stdout


def test_plan_is_near_what_training_takes(tmp_path: Path) -> None:
    assert 0.5 < measured("plan", tmp_path)["ratios"]["largest error"]["median"] + 0.6 < 1


def test_loading_reads_what_a_rank_keeps(tmp_path: Path) -> None:
    assert measured("loading", tmp_path)["ratios"]["from_pretrained / ours"]["median"] > 1


def test_differences_between_methods_are_paired() -> None:
    from methods import Sizes, as_markdown

    def row(method: str, seed: int, *verdicts: list[float]) -> dict:
        named = {f"t{number}/exact_match": values for number, values in enumerate(verdicts)}
        return {"key": ["a setting", "shared", seed, method], "seconds": 1, "verdicts": named}

    rows = [
        row("fedit", 0, [0.0] * 10, [1.0, 0.0]),
        row("fedex", 0, [1.0] * 10, [1.0, 0.0]),
        row("fedex", 1, [1.0] * 10, [1.0, 1.0]),
    ]
    lines = as_markdown(rows, Sizes(), "tiny").splitlines()
    assert "| shared | fedit | 25.0% | 1 |  |" in lines
    (line,) = (line for line in lines if line.startswith("| shared | fedex |"))
    assert line.startswith("| shared | fedex | 87.5% | 2 | +50.0 (")


def test_what_cannot_be_measured_is_told_on_one_line(tmp_path: Path) -> None:
    done = run("client_switch", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: model.path: ")


def test_a_goal_is_judged_by_the_median() -> None:
    from common import Ratio

    values = [0.5, 30, 40]
    assert Ratio(name="", values=values, at_least=20).goal == "goal >= 20: reached"
    assert Ratio(name="", values=values, at_least=31).goal == "goal >= 31: missed"
    assert Ratio(name="", values=values, at_most=1.02).goal == "goal <= 1.02: missed"
    assert Ratio(name="", values=values).goal == ""


def test_differences_over_seeds_are_wider_than_over_examples_alone() -> None:
    import numpy as np
    from methods_page import interval, over_seeds

    changes = [np.full(50, change) for change in (-0.2, 0.1, 0.4)]
    low, high = over_seeds(changes)
    assert (low, high) == pytest.approx((-0.2, 0.4), abs=0.11)
    assert interval(changes[0]) == pytest.approx((-0.2, -0.2))


def test_a_page_keeps_the_tables_of_which_no_line_is_at_hand() -> None:
    from methods import Sizes, as_markdown
    from methods_page import with_kept

    line = {"key": ["here", "shared", 0, "fedit"], "seconds": 1, "verdicts": {"t/x": [1.0]}}
    old = as_markdown([line | {"key": ["there", "shared", 0, "fedit"]}], Sizes(), "tiny")
    page = with_kept(as_markdown([line], Sizes(), "tiny"), old)
    assert page.count("## here") == page.count("## there") == page.count("## Not run here") == 1
    assert with_kept(as_markdown([line], Sizes(), "tiny"), page) == page


def test_a_line_is_compact_and_read_back(tmp_path: Path) -> None:
    from methods import packed
    from methods_page import read_rows

    assert packed([1.0, 0.0, 1.0]) == "101"
    assert packed([0.25, 1 / 3]) == [0.25, 0.3333]
    line = {"key": [], "seconds": 1, "verdicts": {"a": "101", "b": [0.25]}}
    (tmp_path / "lines").write_text(json.dumps(line) + "\n")
    (row,) = read_rows(tmp_path / "lines")
    assert row["verdicts"] == {"a": [1.0, 0.0, 1.0], "b": [0.25]}


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["rank", "assignment", "deviation"])
def test_sweeps_go_on_where_they_were_stopped(sweep: str, tmp_path: Path) -> None:
    config = write_head_config(tmp_path, train={"local_epochs": 1})
    lines = tmp_path / "lines.jsonl"
    where = ("--config", str(config), "--lines", str(lines), "--out", str(tmp_path / "out"))
    done = run("sweeps", "none", "--sweep", sweep, *where)
    assert done.returncode == 0, done.stderr
    measured = lines.read_text()
    assert len(measured.splitlines()) == (4 if sweep == "rank" else 2)
    assert "paper" in done.stdout
    again = run("sweeps", "none", "--sweep", sweep, *where)
    assert lines.read_text() == measured
    assert again.stdout == done.stdout
