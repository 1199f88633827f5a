"""Two ranks load a checkpoint into ZeRO-3 shards, each its own slices, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_llama

from fedex_scale.runtime.distributed import free_port

ROOT = Path(__file__).parents[2]
MB = 1e6


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound models, one of 200 MB, one that lacks a weight, and one with a wrong shape."""
    folder = tmp_path_factory.mktemp("models")
    for name, source in (("llama", tiny_llama), ("gpt2", tiny_gpt2)):
        shutil.copytree(source, folder / name)
    make_llama(folder / "large", width=1024, inner=8192, shard_size="50MB")
    shutil.copytree(tiny_gpt2, folder / "missing")
    weights = load_file(tiny_gpt2 / "model.safetensors")
    weights.pop("transformer.ln_f.weight")
    save_file(weights, folder / "missing" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(tiny_llama, folder / "wrong")
    config = json.loads((tiny_llama / "config.json").read_text())
    config["intermediate_size"] += 1
    (folder / "wrong" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("out")
    worker = str(Path(__file__).with_name("loading_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port()}", worker, str(folder), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_shards_are_the_files_bit_for_bit(ranks: list[dict]) -> None:
    for results in ranks:
        loads = {key: found for key, found in results.items() if key.startswith(("llama", "gpt2"))}
        assert len(loads) == 8
        assert all(found == [] for found in loads.values()), loads


def test_random_weights_do_not_depend_on_the_ranks(ranks: list[dict]) -> None:
    for results in ranks:
        assert results["random"] == []
        assert results["spread"] == pytest.approx(0.1, rel=0.1)  # the config's initializer_range


def test_files_that_do_not_fit_are_one_line_on_every_rank(ranks: list[dict]) -> None:
    for results in ranks:
        missing, wrong = results["errors"]["missing"], results["errors"]["wrong"]
        assert "expected the weight transformer.ln_f.weight in its files, found none" in missing
        assert "mlp.gate_proj.weight: expected shape (113, 48), as config.json says" in wrong
        assert "\n" not in missing + wrong


def test_a_rank_holds_its_shard_and_little_more(folder: Path, ranks: list[dict]) -> None:
    size = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
    assert size > 190 * MB
    for results in ranks:
        # Beside its half: 8 MB to read through, and what Python and the allocator take.
        assert results["peak"] < size / 2 + 40 * MB
