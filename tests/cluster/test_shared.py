"""Ranks that do not see one file system are told so by name, before they train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from resuming import write_config

from fedex_scale.runtime.distributed import free_port


@pytest.mark.slow
def test_ranks_in_directories_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tiny_llama, tmp_path)
    program = f"{sys.executable} {ROOT / 'launch' / 'instruct.py'} --config {config} run.dir=runs"
    there = f"mkdir -p {tmp_path}/$RANK && cd {tmp_path}/$RANK && exec {program}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port", str(free_port()), "--no-python", "sh", "-c", there]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode != 0
    assert "run.dir: rank 1 on " in done.stderr
    assert "does not see" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
