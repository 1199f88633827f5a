"""The peak memory that `fedex-scale plan` predicts, against that of real training.

    python benchmarks/plan.py [--examples 2] [--length 64] [--dtype float32] [--only NAME] [--quick]

Trains a few steps in processes of their own, on the CPU, with random weights: SmolLM2
and a small Llama; plain PyTorch, ZeRO-2, ZeRO-3 and offload; one and two ranks. A peak is VmHWM,
over the process with everything imported and joined. Freed memory goes back to the system at once
(MALLOC_MMAP_THRESHOLD_): otherwise the allocator's habits would be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import Figure, Ratio, forget_peak, memory, report, start

from fedex_scale.runtime.distributed import free_port
from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
STEPS = 2
GOAL = 0.1
# Allocations from 64 kB on come from the system and go back to it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    model: str
    deepspeed: str | None = None
    ranks: int = 1
    checkpointing: bool = False
    examples: int = 2
    length: int = 64
    dtype: str = "float32"

    def __str__(self) -> str:
        how = (self.deepspeed or "plain") + (", checkpointing" if self.checkpointing else "")
        return f"{self.model}, {how}, {self.ranks} rank{'s' * (self.ranks > 1)}"


SETTINGS = [
    Setting(model="smollm2-135m"),
    Setting(model="smollm2-135m", checkpointing=True),
    Setting(model="smollm2-135m", deepspeed="zero2", ranks=2),
    Setting(model="smollm2-135m", deepspeed="zero3", ranks=2),
    Setting(model="small"),
    Setting(model="small", deepspeed="zero3", ranks=2),
    Setting(model="small", deepspeed="zero3_offload"),
    Setting(model="small", deepspeed="zero3_offload", ranks=2, checkpointing=True),
]


def benchmark(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small = {**SMALL, "num_hidden_layers": 1} if args.quick else SMALL
        (folder / "small.json").write_text(json.dumps(small))
        chosen = SETTINGS[4:5] if args.quick else SETTINGS
        if args.only:
            chosen = [setting for setting in SETTINGS if args.only in str(setting)]
        size = {"examples": args.examples, "length": args.length, "dtype": args.dtype}
        rows = {str(setting): run(replace(setting, **size), folder) for setting in chosen}
    report(
        __file__,
        f"{args.dtype}, LoRA of rank 32, {args.examples} x {args.length} tokens, {STEPS} steps, "
        "ranks together",
        [
            Figure(name=f"{name}: {what}", values=[row[what]], unit="MB")
            for name, row in rows.items()
            for what in ("predicted", "measured")
        ],
        [
            *(
                Ratio(name=f"predicted / measured: {name}", values=[row["ratio"]])
                for name, row in rows.items()
            ),
            Ratio(
                name="largest error",
                values=[max(abs(row["ratio"] - 1) for row in rows.values())],
                at_most=GOAL,
            ),
        ],
    )


def run(setting: Setting, folder: Path) -> dict[str, float]:
    """Train in processes of their own; return what was predicted and measured, in MB."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={setting.ranks}"]
    command += [f"--master-port={free_port()}", __file__, "--rank-of"]
    command += [json.dumps(vars(setting)), str(folder)]
    environment = {**os.environ, **MALLOC, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{setting} failed: {done.stderr.strip()[-2000:]}")
    lines = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(setting.ranks)]
    measured = sum(line["peak"] for line in lines) / 1e6
    predicted = max(line["predicted"] for line in lines) / 1e6
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured}


def measure_rank(text: str, folder: str) -> None:
    """Be one rank: predict, train, and print both."""
    import deepspeed  # noqa: F401  its import is no part of the training

    from fedex_scale.engine import build, contents, training
    from fedex_scale.methods.algebra import Pair
    from fedex_scale.runtime import distributed

    setting = Setting(**json.loads(text))
    config = config_of(setting, Path(folder))
    distributed.join_group(required=setting.deepspeed is not None)
    predicted = predict(config, setting.ranks) if distributed.is_main() else 0
    distributed.barrier()
    warm_up()
    forget_peak()
    before = memory("VmRSS")
    built = build.build_engine(
        config.model,
        config.lora,
        config.engine,
        trains=frozenset("AB"),
        side_rank=64,
        optimizer="adamw",
        micro_batch_size=setting.examples,
        accumulation=1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    # As in a run: the server's adapter on each rank, on one a client's that is being written.
    held = [dict(contents.read_pairs(built))]
    if distributed.is_main():
        held.append({name: Pair(*(x.clone() for x in pair)) for name, pair in held[0].items()})
    tokens = torch.randint(5, 200, (setting.examples, setting.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    for _ in range(STEPS):
        training.train_step(built, [batch], units=tokens.numel() * setting.ranks, lr=1e-4)
    found = {"predicted": predicted, "peak": memory("VmHWM") - before}
    (Path(folder) / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.leave(0)


def config_of(setting: Setting, folder: Path):
    """Return the run's config."""
    import yaml

    from fedex_scale.config.load import load_config

    file = setting.deepspeed and str(ROOT / "ds_configs" / f"{setting.deepspeed}.json")
    small = setting.model == "small"
    tree = {
        "model": {
            "config": str(folder / "small.json") if small else setting.model,
            "random": True,
            "dtype": setting.dtype,
            "gradient_checkpointing": setting.checkpointing,
        },
        "data": {"path": "none.jsonl", "max_length": setting.length, "num_examples": 100},
        "train": {"micro_batch_size": setting.examples, "batch_size": setting.examples},
        "engine": {"deepspeed": file},
    }
    path = folder / f"{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


def predict(config, ranks: int) -> float:
    """Return the bytes in host RAM that `plan` names, less those of the bare processes."""
    from fedex_scale.planning.choice import make_plan
    from fedex_scale.planning.machine import Machine

    chosen = make_plan(config, Machine(gpus=ranks)).chosen
    return sum(need.host for need in chosen.needs if need.name != "processes")


def warm_up() -> None:
    """Let the libraries allocate what they need for any computation."""
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(4, 64)).sum().backward()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        measure_rank(*sys.argv[2:])
    else:
        only = {"help": "those settings whose name has this in it, such as zero3"}
        sizes = {
            "examples": {"type": int, "default": 2, "help": "of a micro-batch (%(default)s)"},
            "length": {"type": int, "default": 64, "help": "tokens of each (%(default)s)"},
            "dtype": {"default": "float32", "help": "or bfloat16 (%(default)s)"},
        }
        start(__doc__, benchmark, only=only, **sizes)
