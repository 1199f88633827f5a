"""launch/slurm.sh on a real Slurm: two nodes, preempted in the middle of a client, queued again."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, start
from resuming import differing, write_config
from slurm import PROGRAMS, Slurm, program

from fedex_scale.runtime.distributed import free_port

LACKING = [name for name in PROGRAMS if program(name) is None]
WAIT_S = 900
OPTIONS = ("train.local_epochs=8", "run.save_steps=1000")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"no {', '.join(LACKING)}; apt-get install slurmctld slurmd slurm-client munge",
    ),
]


def test_a_preempted_job_goes_on_to_the_same_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tiny_llama, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    done = start([*torchrun, "--master-port", str(free_port())], config, "run.name=whole", *OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    place = tmp_path / "place"  # what the script expects to be submitted from
    place.mkdir()
    (place / "launch").symlink_to(ROOT / "launch")
    (place / ".venv").symlink_to(Path(sys.executable).parents[1])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Slurm(tmp_path / "slurm") as cluster:
        script = [str(ROOT / "launch" / "slurm.sh"), str(config), "run.name=parts", *OPTIONS]
        told = cluster.call("sbatch", "--parsable", "--gpus-per-node=0", *script, cwd=place)
        job = told.strip()
        out = place / f"slurm-{job}.out"
        metrics = tmp_path / "runs" / "parts" / "metrics.jsonl"
        wait_for(lambda: in_second_client(metrics), out)
        cluster.call("scontrol", "requeue", job)
        wait_for(lambda: cluster.state(job) == "PENDING", out)
        cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), out)
        assert cluster.state(job) == "COMPLETED", out.read_text()[-3000:]
    said = out.read_text()
    # Nothing but the request to end, which Slurm sends to every rank, saves within a client.
    assert re.search(r"going on from checkpoint \d+: round 1, client 1, after step \d+", said), said
    assert "2 x cpu" in said.replace("\n", " ")
    assert differing(tmp_path / "runs" / "whole", tmp_path / "runs" / "parts") == []


def in_second_client(metrics: Path) -> bool:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return any(x["event"] == "step" and x["client"] == 1 and x["step"] > 2 for x in events)


def wait_for(condition, out: Path) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        said = out.read_text()[-3000:] if out.exists() else "nothing"
        assert time.monotonic() < end, f"waited too long; the job said: {said}"
        time.sleep(0.3)
