"""Experiment trackers get a run's numbers: a real run, and what the tracker's own reader finds."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT

from fedex_scale.runtime.trackers import Trackers

CLIENTS = ("client-0000", "client-0001")


def run_tracked(config: Path, folder: Path, name: str, **environment: str) -> Path:
    """Do a run to its end; return its directory."""
    done = start_tracked(config, folder, name, **environment)
    assert done.returncode == 0, done.stderr
    return folder / f"with_{name}"


def start_tracked(
    config: Path, folder: Path, name: str, *overrides: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do a run of two clients and two rounds in a process of its own."""
    program = "import sys; from fedex_scale.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "run", "--config", str(config)]
    command += [f"run.trackers=[{name}]", f"run.dir={folder}", f"run.name=with_{name}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*command, "partition.num_clients=2", "data.holdout=0.2", *overrides],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=folder,
    )


def told(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the series that metrics.jsonl asks for: name -> (place on its axis, value)."""
    series = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            group = f"client-{event['client']:04d}"
            at = len(series[f"{group}/loss"]) + 1
            for key in ("loss", "lr"):
                series[f"{group}/{key}"].append((at, event[key]))
        if event["event"] == "round":
            for key in ("kept", "kept_of_all"):
                series[f"rounds/{key}"].append((event["round"], event[key]))
        if event["event"] == "held_out":
            for key in ("loss", "perplexity"):
                series[f"held_out/{key}"].append((event["round"], event[key]))
            for name, loss in event["clients"].items():
                series[f"held_out/{name}/loss"].append((event["round"], loss))
        if event["event"] == "eval":
            for key in event:
                if "/" in key:
                    series[f"scores/{key}"].append((event["round"], event[key]))
    return dict(series)


def check(read: dict[str, list[tuple[int, float]]], run: Path) -> None:
    expected = told(run)
    assert {f"{client}/loss" for client in CLIENTS} < set(expected)
    assert any(name.startswith("scores/") for name in expected)
    assert {"held_out/loss", "held_out/perplexity", "held_out/client 1/loss"} < set(expected)
    for name, points in expected.items():
        assert [at for at, _ in read[name]] == [at for at, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in read[name]] == pytest.approx(values, rel=1e-6), name
    for client in CLIENTS:
        rates = read[f"{client}/tokens_per_s"]
        assert len(rates) == len(expected[f"{client}/loss"])
        assert all(value > 0 for _, value in rates)


def tensorboard_series(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in names}


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: LevelDB's log format after a header of 7 bytes."""
    at, record, block = 7, b"", 32768
    while at < len(log):
        if block - at % block < 7:  # too short for a record's header: padding
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_tensorboard(tiny_config: Path, tmp_path: Path) -> None:
    run = run_tracked(tiny_config, tmp_path, "tensorboard")
    check(tensorboard_series(run), run)


def test_wandb(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    run = run_tracked(tiny_config, tmp_path, "wandb", WANDB_MODE="offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    read, axes = defaultdict(list), set()
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.metric.step_metric:
            axes.add((record.metric.glob_name, record.metric.step_metric))
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in row.items():
            axis = f"{name.split('/')[0]}/step"
            if axis in row:
                read[name].append((row[axis], value))
    check(read, run)
    assert b"report-with_wandb" in file.read_bytes()
    assert {(f"{x}/*", f"{x}/step") for x in (*CLIENTS, "rounds", "scores")} <= axes


def test_trackio(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = run_tracked(tiny_config, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    program = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as store; "
        "print(json.dumps(store.get_logs('fedex-scale', 'with_trackio')))"
    )
    rows = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
    )
    read = defaultdict(list)
    for row in json.loads(rows.stdout.splitlines()[-1]):
        for name in row.keys() - {"step", "timestamp"}:
            read[name].append((row["step"], row[name]))
    check(read, run)


def test_mlflow(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = run_tracked(tiny_config, tmp_path, "mlflow", MLFLOW_TRACKING_URI=address)
    program = (
        "import json; from mlflow import MlflowClient; client = MlflowClient()\n"
        "(experiment,) = client.search_experiments(filter_string=\"name = 'fedex-scale'\")\n"
        "(run,) = client.search_runs([experiment.experiment_id])\n"
        "points = {name: [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, "
        "name)] for name in run.data.metrics}\n"
        "files = [x.path for x in client.list_artifacts(run.info.run_id)]\n"
        "print(json.dumps([run.info.run_name, run.info.status, run.data.params, points, files]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": address},
        cwd=tmp_path,
    )
    name, status, parameters, points, files = json.loads(done.stdout.splitlines()[-1])
    assert (name, status, files) == ("with_mlflow", "FINISHED", ["report.html"])
    assert parameters["train.learning_rate"] == "0.001"
    check(points, run)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_cannot_start_is_one_line_before_the_model_loads(
    name: str, tiny_config: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "path" / name
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('broken\\nfor good')")
    done = start_tracked(tiny_config, tmp_path, name, PYTHONPATH=f"{ROOT}:{broken.parent}")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"expected {name} to start, got RuntimeError: broken for good; " in line
    assert not list(tmp_path.glob(f"*with_{name}*"))


def test_a_run_that_goes_on_goes_on_with_its_axis(tmp_path: Path) -> None:
    places = [(1, 1), (1, 2), (2, 1), (2, 1), (2, 2)]  # round 2 was begun again
    steps = [{"event": "step", "round": r, "client": 0, "step": s, "loss": 1.0} for r, s in places]
    with Trackers(("tensorboard",), tmp_path) as trackers:
        trackers.open({"run": {"name": "x", "seed": None}})
        trackers.begin(steps[:3])
        for fields in steps[3:]:
            trackers.log("step", fields)
    assert tensorboard_series(tmp_path)["client-0000/loss"] == [(3, 1.0), (4, 1.0)]
