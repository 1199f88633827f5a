"""Many rounds on two gloo ranks: the same bits as in one process, whatever holds the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from resuming import files
from transformers import AutoModelForCausalLM

from fedex_scale.runtime.distributed import free_port

ROOT = Path(__file__).parents[2]


def start(model: Path, out: Path, *overrides: str, ranks: int) -> list[dict]:
    out.mkdir(parents=True)
    worker = str(Path(__file__).with_name("rounds_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={free_port()}", worker, str(model), str(out), *overrides]
    path = f"{ROOT}:{ROOT / 'tests'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tmp_path_factory) -> tuple[Path, dict]:
    """Return what one process left, and what it saw."""
    out = tmp_path_factory.mktemp("rounds") / "plain"
    (results,) = start(tiny_llama, out, ranks=1)
    return out, results


@pytest.mark.parametrize("settings", ["zero2", "zero3_offload"])
def test_ranks_hold_what_one_process_does(settings, plain, tiny_llama: Path, tmp_path) -> None:
    alone, expected = plain
    config = ROOT / "ds_configs" / f"{settings}.json"
    ranks = start(tiny_llama, tmp_path / "two", f"engine.deepspeed={config}", ranks=2)
    for results in ranks:
        for fold in ("side", "planes"):
            assert results[fold]["shares"] == expected[fold]["shares"]
        # Planes are scored with the adapter that trains, which DeepSpeed holds in bf16.
        assert torch.equal(results["side"]["scored"], expected["side"]["scored"])
    for fold in ("side", "planes"):
        mine, theirs = (files(path / fold / "run") for path in (tmp_path / "two", alone))
        assert mine.keys() == theirs.keys()
        # Norms are summed shard by shard there.
        told = [name for name in mine if fold == "planes" and name.endswith("aggregate.json")]
        assert [name for name in mine if name not in told and mine[name] != theirs[name]] == []


def test_a_side_adapter_that_is_handed_over_is_what_was_scored(plain, tiny_llama: Path) -> None:
    out, expected = plain
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, out / "side" / "run" / "final" / "adapter").eval()
    with torch.no_grad():
        got = model(input_ids=torch.arange(5, 25)[None]).logits
    assert torch.equal(got, expected["side"]["scored"])


def test_planes_are_handed_over_as_their_sum(plain) -> None:
    out, expected = plain
    base = AutoModelForCausalLM.from_pretrained(out / "planes" / "run" / "final" / "base")
    assert base.dtype == torch.float32
    for layer, weight in expected["planes"]["seen"].items():
        assert torch.equal(base.get_submodule(layer).weight, weight.float())
