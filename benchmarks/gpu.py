"""The recipes' models on one GPU, with random weights at their real shapes: at most 9 minutes.

    python benchmarks/gpu.py

Training tokens/s at 512 tokens, as a share of the card's measured bf16 matmul rate and against
transformers.Trainer + PEFT at its best micro-batch, without and with a side adapter; a client
switch; folds against a device copy; peak memory against `fedex-scale plan`; what ZeRO-3 and offload
cost. No network. Without CUDA it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import Figure, Ratio, report, start
from gpu_parts import CUDA, LENGTH, RANK, ROOT, measure

BUDGET_S = 520
# In this order, as long as there is time.
PARTS = [
    ("mistral-7b", "ours"),
    ("mistral-7b", "trainer"),
    ("llama32-3b", "ours"),
    ("llama32-3b", "trainer"),
    ("gemma2-9b", "ours"),
    ("mistral-7b", "zero3"),
    ("mistral-7b", "zero3_offload"),
    ("gemma2-9b", "trainer"),
]
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}


def benchmark(args: argparse.Namespace) -> None:
    if not (CUDA or args.quick):
        print("gpu: no CUDA device here, so there is nothing to measure")
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        tiny = Path(scratch) / "tiny.json"
        tiny.write_text(json.dumps(TINY))
        parts = [(str(tiny), part) for _, part in PARTS[:2]] if args.quick else PARTS
        rows = {}
        for model, part in parts:
            left = BUDGET_S - (time.perf_counter() - began)
            rows[f"{Path(model).stem}, {part}"] = measure_apart(model, part, left)
    measured = {name: row for name, row in rows.items() if "error" not in row}
    units = {"tokens": "tokens/s", "peak": "GB", "planned": "GB", "rate": "TFLOP/s"}
    report(
        __file__,
        f"random weights, LoRA of rank {RANK}, {LENGTH} tokens an example",
        [
            Figure(name=f"{name}: {key}", values=[value], unit=units.get(key.split()[0], "s"))
            for name, row in measured.items()
            for key, value in row.items()
            if isinstance(value, float)
        ],
        list(ratios(measured)),
        not_measured={name: row["error"] for name, row in rows.items() if "error" in row},
        settings_of={name: row["setting"] for name, row in measured.items()},
    )


def ratios(rows: dict[str, dict]) -> Iterator[Ratio]:
    """Yield what the figures are judged by."""
    for name, row in rows.items():
        model, _, part = name.partition(", ")
        ours = rows.get(f"{model}, ours")
        if part == "ours":
            share = row["rate trained"] / row["rate of a matmul"]
            yield Ratio(name=f"{name}: share of the matmul rate", values=[share], at_least=0.5)
            for mode, most in (("round", 2), ("carry", 4)):  # which moves three times as much
                slower = row[f"fold: {mode}"] / row["copy of the folded weights"]
                yield Ratio(name=f"{name}: fold, {mode} / copy", values=[slower], at_most=most)
            yield Ratio(name=f"{name}: side (s)", values=[row["fold: side"]], at_most=3)
            yield Ratio(name=f"{name}: client switch (s)", values=[row["client switch"]], at_most=1)
            if "peak" in row:
                ratio = row["planned"] / row["peak"]
                yield Ratio(name=f"{name}: planned / peak memory", values=[ratio], at_most=1.1)
                yield Ratio(name=f"{name}: peak / planned memory", values=[1 / ratio], at_most=1.1)
        elif ours:
            faster = ours["tokens"] / row["tokens"]
            goal = {"at_least": 1.25} if part == "trainer" else {}
            yield Ratio(name=f"{model}: ours / {part}, tokens/s", values=[faster], **goal)


def measure_apart(model: str, part: str, left: float) -> dict:
    """Measure one part in a process of its own, as what is left on a card would count."""
    if left < 30:
        return {"error": "no time left"}
    command = [sys.executable, __file__, "--part", model, part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # The Trainer would take all that it sees, by DataParallel.
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=left
        )
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"setting"')]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    return json.loads(lines[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        measure(*sys.argv[2:])
    else:
        start(__doc__, benchmark)
