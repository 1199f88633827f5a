"""Synthetic checkpoints and adapters for the benchmarks, and a process measured from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedex_scale.files.adapter_writers import AdapterWriter
from fedex_scale.files.tensorfile import SafetensorsWriter
from fedex_scale.methods.algebra import Pair

Shapes = Mapping[str, tuple[int, int]]
BLOCK = 2**22
ROOT = Path(__file__).parents[1]
PROGRAM = """
import atexit, sys
from pathlib import Path
out, status = Path(sys.argv[1]), Path("/proc/self/status")
atexit.register(lambda: out.write_text(status.read_text()))
from fedex_scale.cli import main
main(sys.argv[2:])
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finished process: its wall-clock time and its peak resident memory."""

    seconds: float
    peak_mb: float

    def report_of(self, out: Path) -> dict:
        return json.loads((out / "report.json").read_text())


def mistral_shapes(num_layers: int) -> tuple[Shapes, Shapes]:
    """Return Mistral-7B's linear layers as (O, I), and its other weights, both by name."""
    projections = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    layers = {
        f"model.layers.{i}.{name}": shape
        for i in range(num_layers)
        for name, shape in projections.items()
    }
    others = {
        "model.embed_tokens": (32000, 4096),
        "lm_head": (32000, 4096),
        "model.norm": (1, 4096),
    }
    return layers, others


def write_base(directory: Path, layers: Shapes, others: Shapes, *, files: int) -> int:
    """Write a bf16 checkpoint of random weights in so many files; return its size in bytes."""
    directory.mkdir(parents=True)
    names = [f"{name}.weight" for name in (*layers, *others)]
    shapes = dict(zip(names, [*layers.values(), *others.values()], strict=True))
    per_file = -(-len(names) // files)
    places, total = {}, 0
    noise = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    for number in range(files):
        some = names[number * per_file : (number + 1) * per_file]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        file = "model.safetensors" if files == 1 else file
        specs = {name: (torch.bfloat16, shapes[name]) for name in some}
        with SafetensorsWriter(directory / file, specs) as writer:
            for name in some:
                numel = torch.Size(shapes[name]).numel()
                writer.write_blocks(name, _repeated(noise, numel))
                places[name], total = file, total + 2 * numel
    if files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(
        json.dumps({"model_type": "mistral", "dtype": "bfloat16", "tie_word_embeddings": False})
    )
    return total


def write_adapter(directory: Path, shapes: Shapes, *, rank: int, seed: int) -> None:
    """Write a client near the one that all of them share."""
    with AdapterWriter(directory, shapes, rank=rank, alpha=rank / 2, base="synthetic") as writer:
        for i, (layer, (num_out, num_in)) in enumerate(shapes.items()):
            common, own = (torch.Generator().manual_seed(i + 1000 * s) for s in (0, seed + 1))
            A_RI, B_OR = (
                0.02 * torch.randn(shape, generator=common)
                + 0.002 * torch.randn(shape, generator=own)
                for shape in ((rank, num_in), (num_out, rank))
            )
            writer.write(layer, Pair(A_RI, B_OR))


def run_measured(arguments: Sequence[object], tree: Path = ROOT) -> Measured:
    """Run `fedex-scale` in a process of its own, to its end.

    Its peak is read from within: what the kernel tells of a child counts the parent's memory too.

    Args:
        tree: the checkout whose code runs.
    """
    with tempfile.NamedTemporaryFile() as status:
        command = [sys.executable, "-c", PROGRAM, status.name, *map(str, arguments)]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"fedex-scale {arguments[0]}: {done.stderr}")
        lines = Path(status.name).read_text().splitlines()
    peak_kb = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
    return Measured(seconds=seconds, peak_mb=float(peak_kb) / 1e3)


def _repeated(noise: Tensor, numel: int) -> Iterator[Tensor]:
    for start in range(0, numel, len(noise)):
        yield noise[: min(len(noise), numel - start)]
