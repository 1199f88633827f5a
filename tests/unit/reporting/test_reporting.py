"""The record of a run and the page made of it, for runs of every kind and state."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from resuming import write_config

from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting import costs, deviations, losses, record, samples, tables, words
from fedex_scale.reporting.page import write_report
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import write_file

SVG = "{http://www.w3.org/2000/svg}"
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A function that makes a run of a model, with overrides, once."""
    made: dict[tuple, Path] = {}

    def run(model: Path, *overrides: str) -> Path:
        key = (model, *overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("runs")
            run_config(write_config(model, folder), list(overrides))
            made[key] = next((folder / "runs").iterdir())
        return made[key]

    return run


def test_the_run_keeps_the_record_that_is_gathered_later(runs: Runs, tiny_llama: Path) -> None:
    run = runs(tiny_llama)
    kept = json.loads((run / "report.json").read_text())
    assert kept == json.loads(json.dumps(record.gather(RunDir(run))))
    assert kept["finished"]
    assert kept["facts"]["versions"].keys() >= {"fedex_scale", "torch", "peft"}
    assert kept["facts"]["base_parameters"] > 10 * 48 * 48
    assert [round["round"] for round in kept["rounds"]] == [1, 2]
    assert len(kept["steps"]) == 2 * 3 * 3


def test_full_fine_tuning_is_counted_with_the_model_itself(runs: Runs, tiny_llama: Path) -> None:
    kept = record.gather(RunDir(runs(tiny_llama)))
    rows = {row["label"]: row for row in kept["communication"]}
    assert rows["full"]["up"] == kept["facts"]["base_parameters"]
    assert next(iter(rows)) == "fedex"
    assert len(kept["communication"]) == len(rows)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=centralized",),
        ("method.name=flora", "lora.target_modules=[q_proj]"),
        ("method.svd_rank=2", "aggregate.fold=round", "federation.rounds=1"),
        ("partition.num_clients=20", "federation.client_fraction=0.5", "lora.rank=1"),
        ("run.name=a $x^2$ <b>&amp;", "partition.kind=dirichlet", "partition.column=type"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_run_has_a_page(
    overrides: tuple[str, ...], runs: Runs, tiny_llama: Path, tmp_path: Path
) -> None:
    run = runs(tiny_llama, *overrides)
    text = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert "What was run" in text
    assert "has not finished" not in text
    assert "<b>&amp;" not in text.replace("&lt;b&gt;&amp;", "")
    for file in (tmp_path / "plots").glob("*.svg"):
        ET.parse(file)


def test_gpt2s_projections_have_names(runs: Runs, tiny_gpt2: Path, tmp_path: Path) -> None:
    run = runs(tiny_gpt2)
    write_report([run], tmp_path)
    with (tmp_path / "plots" / "run-deviation-depth.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["projection"] for row in rows} == {"QKV", "O", "up", "down"}
    assert {row["depth"] for row in rows} == {"0", "1"}


def test_two_runs_of_one_name_stay_apart(runs: Runs, tiny_llama: Path, tmp_path: Path) -> None:
    first = runs(tiny_llama)
    other = tmp_path / "run"
    shutil.copytree(first, other)
    text = write_report([first, other], tmp_path / "out").read_text(encoding="utf-8")
    assert "2 runs compared" in text
    assert "run (2): Training loss" in text


def test_a_run_that_was_stopped_at_once_has_a_page(
    runs: Runs, tiny_llama: Path, tmp_path: Path
) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    for name in ("config.yaml", "partition.json"):
        shutil.copy(runs(tiny_llama) / name, run)
    # As a server knows of its sites.
    (run / "partition.json").write_text(json.dumps({"clients": [{"num_examples": 7}] * 2}))
    text = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    assert "This run has not finished: 0 of 2 rounds done." in text
    assert "client 1" in text


def test_a_directory_in_a_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UserError, match=r"report\.json: expected a file there, got a directory"):
        write_file(tmp_path / "report.json", "{}")
    assert [x.name for x in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["partition.json", "server/round-0001/aggregate.json"])
def test_a_damaged_file_is_named(name: str, runs: Runs, tiny_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs(tiny_llama), run)
    (run / name).write_text("{")
    with pytest.raises(UserError, match=f"{name}: not valid JSON"):
        write_report([run], tmp_path / "out")
    (run / name).write_text("{}")
    with pytest.raises(UserError, match="restore"):
        write_report([run], tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(runs: Runs, tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"^/proc/none: cannot be written"):
        write_report([runs(tiny_llama)], Path("/proc/none"))


def test_figures_take_the_pages_colours(runs: Runs, tiny_llama: Path) -> None:
    run = record.gather(RunDir(runs(tiny_llama)))
    charts = [losses.loss(run), deviations.by_depth(run), costs.seconds_by_phase(run)]
    for chart in charts:
        svg = chart.svg()
        assert "var(--s1)" in svg
        assert "#2563c9" not in svg
        root = ET.fromstring(svg)
        assert {"viewBox", "role", "aria-label"} <= root.attrib.keys()
        assert "width" not in root.attrib


def test_runs_beside_each_other_share_a_scale(runs: Runs, tiny_llama: Path) -> None:
    run = record.gather(RunDir(runs(tiny_llama)))
    larger = copy.deepcopy(run)
    for round in larger["rounds"]:
        for layer in round["deviation"]["layers"]:
            layer["scaled"] *= 10
    alone = deviations.by_depth(run).figure.axes[0].get_ylim()
    beside = deviations.by_depth(run, [run, larger]).figure.axes[0].get_ylim()
    assert beside[1] == pytest.approx(10 * alone[1])


def steps_of(ends: list[float], *, start: float = 3.0, length: int = 4) -> list[dict]:
    """Return one round's steps of clients whose loss goes straight from a start to an end."""
    return [
        {
            "round": 1,
            "client": client,
            "step": step,
            "loss": start + (end - start) * (step - 1) / (length - 1),
            "lr": 0.1 * step,
            "tokens": 10,
        }
        for client, end in enumerate(ends)
        for step in range(1, length + 1)
    ]


def test_many_clients_are_a_band_with_the_extremes_named() -> None:
    ends = [2.0 + client / 100 for client in range(20)]
    ends[7], ends[11] = 2.9, 1.5
    run = {"name": "x", "steps": steps_of(ends)}
    figure = losses.loss(run).figure
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [
        "all 20 clients",
        "median",
        "client 11, lowest at the end",
        "client 7, highest at the end",
    ]
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((1.5, 3.0))
    few = losses.loss({"name": "x", "steps": steps_of(ends[:8])}).figure
    assert len(few.legends[0].get_texts()) == 8


def test_slow_learning_fills_the_axis() -> None:
    run = {"name": "x", "steps": steps_of([2.99], start=3.0)}
    low, high = losses.loss(run).figure.axes[0].get_ylim()
    assert 2.98 < low < 2.99
    assert 3.0 < high < 3.01


def test_losses_of_runs_lie_over_each_other_as_means_over_clients() -> None:
    runs = [
        {"name": name, "steps": steps_of(ends)} for name, ends in {"a": [1, 2], "b": [2, 3]}.items()
    ]
    chart = losses.losses_compared(runs)
    assert [row for row in chart.rows if row[1] == 4] == [("a", 4, 1.5), ("b", 4, 2.5)]
    assert [text.get_text() for text in chart.figure.legends[0].get_texts()] == ["a", "b"]


def test_answers_show_each_kind_of_change_and_no_control_characters(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    right = {0: [0, 0, 0, 0, 1], 2: [0, 0, 1, 1, 0]}
    for round, verdicts in right.items():
        run.evaluation(round).mkdir(parents=True)
        rows = [
            {"task": "t", "filter": "none", "doc_id": i, "prompt": f"question {i} \x1b[31m"}
            | {"output": [f"answer {i} of {round}" + "x" * 5000], "target": str(i)}
            | {"verdict": {"exact_match": float(verdict)}}
            for i, verdict in enumerate(verdicts)
        ]
        rows.insert(2, {"task": "t", "doc_id": 9, "prompt": "p", "output": [[-1.5, True]]})
        text = "\n".join(map(json.dumps, rows)) + '\n{"cut'
        (run.evaluation(round) / "samples.jsonl").write_text(text)
    found = samples.samples(run)
    assert [x["target"] for x in found] == ["0", "2", "4"]
    assert [(x["before"]["right"], x["after"]["right"]) for x in found] == [
        (False, False),
        (False, True),
        (True, False),
    ]
    assert found[1]["after"]["text"].startswith("answer 2 of 2")
    assert all(len(x["after"]["text"]) < 1000 for x in found)
    assert "\x1b" not in json.dumps(found).replace("\\u001b", "\x1b")


def test_a_quotient_has_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"Q over V": 1.57, "last round over first": 1.36}
    monkeypatch.setattr(tables, "observations", lambda run: values)
    (table,) = tables.observed([{"name": "x"}])
    assert table["rows"] == [
        ["Q over V", "above 1", "1.57, as found"],
        ["last round over first", "below 1", "1.36, not as found"],
    ]


def test_every_head_of_a_table_is_explained(runs: Runs, tiny_llama: Path, tmp_path: Path) -> None:
    run = record.gather(RunDir(runs(tiny_llama)))
    for make in (tables.clients, tables.deviation, tables.observed, tables.kept):
        for table in make([run]):
            heads = [head for head in table["head"] if head]
            assert all(table["about"][head] for head in heads), heads
    text = write_report([runs(tiny_llama)], tmp_path).read_text(encoding="utf-8")
    assert "UTC" in text
    assert "cosine from 0.001" in text
    assert "The prompt as trained" in text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (1e-5, "0.001%"), (0.0192, "1.92%"), (1, "100.00%")]
)
def test_percent(share: float, text: str) -> None:
    assert words.percent(share) == text


def test_duration() -> None:
    assert [words.duration(x) for x in (3.2, 75, 7260)] == ["3 s", "1 min 15 s", "2 h 1 min"]


def test_observations_are_quotients_of_root_mean_squares() -> None:
    def round(number: int, factor: float) -> dict:
        norms = {("q", 0): 3, ("q", 1): 4, ("v", 0): 1, ("v", 1): 2}
        layers = [
            {"layer": f"layers.{depth}.{name}_proj", "scaled": factor * norm}
            for (name, depth), norm in norms.items()
        ]
        return {"round": number, "deviation": {"layers": layers}}

    found = deviations.observations({"rounds": [round(1, 2.0), round(2, 1.0)]})
    assert found == {
        "Q over V": pytest.approx((25 / 5) ** 0.5),
        "deeper half over shallower half": pytest.approx((20 / 10) ** 0.5),
        "last round over first": pytest.approx(0.5),
    }
    assert deviations.observations({"rounds": []}) == {}


def test_a_report_is_never_written_through_a_link(
    runs: Runs, tiny_llama: Path, tmp_path: Path
) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(runs(tiny_llama), run)
    precious.write_text("mine")
    write_report([run], run)
    names = ["report.html", "report.json", *(f"plots/{x.name}" for x in (run / "plots").iterdir())]
    facts = json.loads((run / "report.json").read_text())["facts"]
    for name in (*names, ".report.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    record.write(RunDir(run), facts)
    write_report([run], run)
    assert precious.read_text() == "mine"
    assert not any((run / name).is_symlink() for name in names)
    left = {x.name for x in [*run.iterdir(), *(run / "plots").iterdir()] if x.name[0] == "."}
    assert left == {".report.json"}, "nothing but the link that was put there"


def test_a_directory_of_figures_that_is_a_link_is_refused(
    runs: Runs, tiny_llama: Path, tmp_path: Path
) -> None:
    run, elsewhere = runs(tiny_llama), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plots").symlink_to(elsewhere)
    with pytest.raises(UserError, match="plots: expected a directory, got a link"):
        write_report([run], tmp_path / "out")
    assert not list(elsewhere.iterdir())
