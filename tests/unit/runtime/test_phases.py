"""Phases of a run: every second counts once, and they add up to the wall time."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from resuming import write_config

from fedex_scale.cli import main
from fedex_scale.run import run_config
from fedex_scale.runtime import phases
from fedex_scale.runtime.phases import phase


def test_an_inner_phase_interrupts_the_outer() -> None:
    phases.start()
    with phase("training"):
        time.sleep(0.02)
        with phase("checkpointing"):
            time.sleep(0.05)
    taken = phases.lap()
    seconds = {name: usage["seconds"] for name, usage in taken["phases"].items()}
    assert seconds["checkpointing"] >= 0.05
    assert 0.02 <= seconds["training"] <= taken["wall_s"] - 0.05
    assert sum(seconds.values()) == pytest.approx(taken["wall_s"], rel=0.02)


def test_an_error_ends_its_phase() -> None:
    phases.start()
    with pytest.raises(RuntimeError), phase("folding"):
        raise RuntimeError
    time.sleep(0.02)
    assert phases.lap()["phases"]["other"]["seconds"] >= 0.02


def test_peaks_are_those_of_the_phase() -> None:
    """In a process of its own, which was never larger."""
    program = """
import json
import torch
from fedex_scale.runtime import phases
phases.start()
with phases.phase("folding"):
    x = torch.ones(50_000_000)
del x
with phases.phase("writing"):
    pass
print(json.dumps(phases.lap()["phases"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    usage = json.loads(done.stdout)
    assert usage["folding"]["peak_bytes"] - usage["writing"]["peak_bytes"] > 150e6


def test_phases_of_a_run_add_up_to_its_wall_time(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, tmp_path)
    run_config(config, ["run.profile_steps=[2]"])
    run = tmp_path / "runs" / "run"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    laps = [event for event in events if event["event"] == "phases"]
    assert [event["round"] for event in laps] == [0, 1, 2, None]
    for event in laps[1:3]:
        known = {name: usage["seconds"] for name, usage in event["phases"].items()}
        assert sum(known.values()) == pytest.approx(event["wall_s"], rel=1e-3)
        other = known.pop("other")
        # A round takes 0.4 s here, of which printing is much: 2% are held by tests/e2e.
        assert other < 0.02 * event["wall_s"] + 0.2, known
        assert known.keys() == {"client switch", "training", "writing", "folding", "checkpointing"}
    between = laps[2]["seconds"] - laps[1]["seconds"]
    assert laps[2]["wall_s"] == pytest.approx(between, rel=0.02, abs=0.2)
    trace = json.loads(gzip.decompress((run / "profile" / "step-0002.json.gz").read_bytes()))
    assert len(trace["traceEvents"]) > 100
    assert len(list((run / "profile").iterdir())) == 1


def test_the_command_line_names_steps_to_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("fedex_scale.api.run", lambda config, overrides: asked.append(overrides))
    with pytest.raises(SystemExit):
        main(["run", "--config", "run.yaml", "--profile", "3,4"])
    assert asked == [["run.profile_steps=[3,4]"]]
