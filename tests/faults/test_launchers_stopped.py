"""A signal to a launcher reaches its ranks: they save, and no process stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, write_tiny_config

from fedex_scale.federation import checkpoint
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime.distributed import free_port

LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node=2", "--master-port"],
    "accelerate": [
        *("accelerate", "launch", "--config_file", "launch/accelerate/cpu2.yaml"),
        "--main_process_port",
    ],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_that_is_told_to_end_takes_its_ranks_along(
    name: str, number: signal.Signals, tiny_llama: Path, tmp_path: Path
) -> None:
    config = write_tiny_config(tiny_llama, tmp_path)
    run, told = RunDir(tmp_path / "runs" / "stopped"), tmp_path / "told"
    given = ["run.name=stopped", "federation.rounds=200", "evaluation.tasks=[]"]
    given += ["evaluation.data={}", f"engine.deepspeed={ROOT / 'ds_configs' / 'zero2.json'}"]
    program = [str(ROOT / "launch" / "instruct.py"), "--config", str(config), *given]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with told.open("w") as out:
        launcher = subprocess.Popen(
            [*LAUNCHERS[name], str(free_port()), *program],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PATH": path},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_for(lambda: run.metrics.exists() and '"step"' in run.metrics.read_text(), 300)
        family = psutil.Process(launcher.pid).children(recursive=True)
        assert len(family) >= 2
        launcher.send_signal(number)
        assert launcher.wait(timeout=60) != 0
        wait_for(lambda: not any(x.is_running() and x.status() != "zombie" for x in family), 30)
    finally:
        launcher.kill()
        for process in psutil.process_iter(["cmdline"]):
            if str(config) in (process.info["cmdline"] or []):
                process.kill()
    text = told.read_text()
    assert "stopped by SIG" in text, text[-3000:]
    newest = checkpoint.numbers(run)[-1]
    assert checkpoint.damaged(run, checkpoint.read(run, newest), deep=True) == {}


def wait_for(true, seconds: float) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.2)
