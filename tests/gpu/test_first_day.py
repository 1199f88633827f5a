"""What is to be run on the first day on a card: `make gpu` on one, `make gpus` on two.

Real runs of the real program, each in a process of its own, in every setting of the engine. On one
card a launcher starts one rank, under nccl as with more. On a machine without a card
`FEDEX_SCALE_TRY=1` has them run there, which says that the tests work and nothing of a card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from fold_kernel_checks import BF16, SHARES_OF_TIES, make_carry, make_pieces, make_weight
from launching import ROOT, fedex_scale, start
from safetensors.torch import load_file

from fedex_scale.aggregation.weights import Target, as_stats, fold
from fedex_scale.methods.algebra import LowRank
from fedex_scale.runtime.distributed import free_port

CARDS = int(os.environ.get("FEDEX_SCALE_CARDS", "1"))
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = "bfloat16" if CUDA else "float32"
one_card = pytest.mark.skipif(CARDS > 1, reason="the same on one card as on two: make gpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        CUDA and torch.cuda.device_count() < CARDS, reason=f"fewer than {CARDS} CUDA devices"
    ),
]
Runs = Callable[..., Path]


def launcher() -> list[str]:
    program = [sys.executable, "-m", "torch.distributed.run"]
    return [*program, f"--nproc-per-node={CARDS}", f"--master-port={free_port()}"]


@pytest.fixture(scope="module")
def runs(tiny_config: Path) -> Runs:
    """A function that does a run, once for all that ask for it."""
    folder, done = Path(yaml.safe_load(tiny_config.read_text())["run"]["dir"]), set()

    def run(name: str, *overrides: str) -> Path:
        if name not in done:
            options = [f"run.name={name}", f"model.dtype={DTYPE}", *overrides]
            ended = start(launcher(), tiny_config, *options)
            assert ended.returncode == 0, ended.stderr[-4000:]
            done.add(name)
        return folder / name

    return run


def events(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def final(run: Path) -> torch.Tensor:
    factors = load_file(run / "final" / "exact_adapter" / "adapter_model.safetensors")
    return torch.cat([factors[name].flatten().float() for name in sorted(factors)])


def assert_alike(run: Path, other: Path, *, tolerance: float) -> None:
    """Two runs took the same steps, but for rounding."""
    mine, theirs = ([step["loss"] for step in events(x, "step")] for x in (run, other))
    assert len(mine) == len(theirs) > 10
    assert mine == pytest.approx(theirs, rel=tolerance)


SETTINGS = {
    "plain": [],
    "as PEFT": ["engine.fused_lora=false"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "packing": ["train.packing=true"],
    "carry": ["aggregate.fold=carry"],
    "planes": ["aggregate.fold=planes"],
    "8-bit moments": ["train.optimizer=paged_adamw_8bit" if CUDA else "train.optimizer=adamw_8bit"],
    "zero2": ["engine.deepspeed=zero2"],
    "zero3": ["engine.deepspeed=zero3"],
    "zero3_offload": ["engine.deepspeed=zero3_offload"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_takes_the_same_steps(setting: str, runs: Runs) -> None:
    run = runs(setting.replace(" ", "-"), *SETTINGS[setting])
    loose = 0.05 if CUDA or "bit" in setting else 1e-3
    assert_alike(run, runs("plain"), tolerance=loose)
    kept = [event["kept"] for event in events(run, "round")]
    assert len(kept) == 2
    if setting not in ("carry",):  # which hands on what rounding loses
        assert min(kept) > 0.999


@one_card
@pytest.mark.parametrize("packed", ["nf4", "int8"])
def test_packed_bases_train(packed: str, runs: Runs) -> None:
    run = runs(packed, f"model.quantization={packed}")
    assert_alike(run, runs("plain"), tolerance=0.1)


def test_a_score_is_the_same_live_and_afterwards(runs: Runs, tmp_path: Path) -> None:
    live = events(runs("plain"), "eval")[-1]["fedex_word_problems/exact_match"]
    done = fedex_scale("evaluate", runs("plain"), "--out", tmp_path / "scored")
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    numbers = results["results"]["fedex_word_problems"].values()
    assert live in [x for x in numbers if isinstance(x, (int, float))]


def test_a_killed_run_goes_on(tiny_config: Path, runs: Runs) -> None:
    folder = runs("plain").with_name("killed")
    program = [str(ROOT / "launch" / "instruct.py"), "--config", str(tiny_config)]
    options = ["run.name=killed", f"model.dtype={DTYPE}", "run.save_steps=1"]
    process = subprocess.Popen([*launcher(), *program, *options], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and len(events(folder, "step")) >= 11:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()[-3000:]
    finally:
        # torchrun gives its ranks a session of their own.
        for victim in (*psutil.Process(process.pid).children(recursive=True), process):
            victim.kill()
        process.wait()
    done = start(launcher(), tiny_config, *options, "run.overwrite=false", "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "going on from checkpoint" in done.stdout + done.stderr
    assert_alike(folder, runs("plain"), tolerance=0.05 if CUDA else 0)
    if not CUDA:  # what is promised to the bit on a CPU
        assert torch.equal(final(folder), final(runs("plain")))


@one_card
@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("shape", [(4096, 14336), (1000, 333)])
def test_the_fold_kernel_rounds_as_torch_does(shape: tuple[int, int], carries: bool) -> None:
    W = make_weight(shape, BF16).to(DEVICE)
    pieces = [LowRank(*(x.to(DEVICE) for x in piece)) for piece in make_pieces(shape, (64, 32))]
    carry = make_carry(W).to(DEVICE) if carries else None
    left, told = [], []
    for kernel in (True, False):
        flat = W.clone().view(-1)
        kept = None if carry is None else carry.clone()
        target = Target(flat=flat, shape=shape, carry=kept)
        told += as_stats(fold(target, pieces, carry=carries, use_kernel=kernel))
        left.append(flat)
    differing = (left[0] != left[1]).sum().item()
    assert differing <= SHARES_OF_TIES[BF16] * W.numel()
    assert told[0].intended == pytest.approx(told[1].intended, rel=1e-6)
    assert told[0].missed == pytest.approx(told[1].missed, rel=1e-4)
    half = W.numel() // 2 + 77  # as a rank of ZeRO-3 holds it
    parts = []
    for first, last in ((0, half), (half, W.numel())):
        flat = W.clone().view(-1)[first:last].clone()
        own = None if carry is None else carry[first:last].clone()
        target = Target(flat=flat, shape=shape, start=first, carry=own)
        fold(target, pieces, carry=carries)
        parts.append(flat)
    assert torch.equal(torch.cat(parts), left[0])


@one_card
@pytest.mark.skipif(not CUDA, reason="counts what a card is waited for")
def test_a_step_waits_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "gpu" / "count_waits.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = json.loads(done.stdout.splitlines()[-1])
    assert waits["step"] <= 2, waits  # its loss, and a norm to clip by


@one_card
@pytest.mark.skipif(not CUDA, reason="memory of a card")
@pytest.mark.parametrize("model", ["llama32-3b"])
def test_the_plan_holds(model: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--part", model, "ours"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(next(x for x in done.stdout.splitlines() if x.startswith('{"setting"')))
    assert row["planned"] == pytest.approx(row["peak"], rel=0.1), row
