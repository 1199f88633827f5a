"""What the benchmarks share: repeats in turns, their spread, tables of figures, one JSON line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from fedex_scale.config.learning import LoraSection
from fedex_scale.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

# It speaks when PEFT imports it; all else is silenced by `start`, as tests import this, too.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

MODEL = "models/SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One quantity, measured several times."""

    name: str
    values: Sequence[float]
    unit: str

    def as_dict(self) -> dict:
        return {**_spread(self.values), "unit": self.unit}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure over another, each pair measured one after the other, and what it should be."""

    name: str
    values: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def goal(self) -> str:
        """`goal >= 20: reached`, or `missed`, or nothing; by the median."""
        median = statistics.median(self.values)
        if self.at_least is not None:
            return f"goal >= {self.at_least:g}: {_verdict(median >= self.at_least)}"
        if self.at_most is not None:
            return f"goal <= {self.at_most:g}: {_verdict(median <= self.at_most)}"
        return ""

    def as_dict(self) -> dict:
        return {**_spread(self.values), "goal": self.goal}


def start(doc: str, benchmark: Callable[[argparse.Namespace], None], **options: dict) -> None:
    """Parse the command line and measure; exit with 1 only where nothing could be measured.

    Args:
        options: more options, as `name={argparse keywords}`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="directory or hub id (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="see that it works; no figures to use")
    for name, keywords in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    if "GOMP_SPINCOUNT" not in os.environ:  # as the program does; read when torch is loaded
        os.environ["GOMP_SPINCOUNT"] = "1000"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    try:
        benchmark(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def in_turns(
    measures: Sequence[Callable[[], Mapping[str, float]]], repeats: int
) -> dict[str, list[float]]:
    """Measure all, again and again: a slow spell of the machine then hits all alike.

    Returns:
        The values of each name that the measures answer.
    """
    values: dict[str, list[float]] = {}
    for _ in range(repeats):
        for measure in measures:
            for name, value in measure().items():
                values.setdefault(name, []).append(value)
    return values


def quotients(top: Sequence[float], bottom: Sequence[float]) -> list[float]:
    """Return each repeat's ratio."""
    return [a / b for a, b in zip(top, bottom, strict=True)]


def new_peft_model(model: str, lora: LoraSection) -> PeftModel:
    """Return model and adapter as one makes them with transformers and PEFT alone, float32."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def report(
    file: str, settings: str, figures: Sequence[Figure], ratios: Sequence[Ratio], **extra: object
) -> None:
    """Print the tables, and all of it as the last line, in JSON.

    Args:
        file: the benchmark's `__file__`.
        settings: what was measured, in words.
    """
    console = Console(highlight=False)
    name, machine = Path(file).stem, describe_machine()
    console.print(f"{settings}\n{machine}", markup=False, soft_wrap=True)
    console.print(_table("measured", [(f.name, f.values, f.unit) for f in figures]))
    console.print(_table("ratio", [(r.name, r.values, r.goal) for r in ratios]))
    for key, value in extra.items():
        console.print(f"{key.replace('_', ' ')}: {value}", markup=False, soft_wrap=True)
    line = {
        "benchmark": name,
        "settings": settings,
        "machine": machine,
        "figures": {f.name: f.as_dict() for f in figures},
        "ratios": {r.name: r.as_dict() for r in ratios},
        **extra,
    }
    print(json.dumps(line))


def memory(name: str) -> float:
    """Return VmRSS, this process's memory, or VmHWM, its peak, in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(x.split()[1] for x in lines if x.startswith(f"{name}:")))


def forget_peak() -> None:
    """Let VmHWM count from here; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def describe_machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, f":{cpu}").split(":")[1].strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def _table(title: str, rows: Sequence[tuple[str, Sequence[float], str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    table.add_column("")
    for name, values, note in rows:
        table.add_row(name, *map(_short, _spread(values).values()), note)
    return table


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"
