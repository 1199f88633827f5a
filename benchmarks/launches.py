"""How many operations one Mistral layer starts in training, with LoRA fused and as PEFT does it.

    python benchmarks/launches.py

On a layer of few numbers, whose operations are those of the real one: each that computes something,
and not those that look at memory in another way or reserve it. The first micro-batch of a step, so
that no gradients are summed yet; without checkpointing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from common import start
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from fedex_scale.config.learning import LoraSection
from fedex_scale.engine import lora_model
from fedex_scale.engine.fused import stacks_held
from fedex_scale.engine.lora_model import CLIENT, SIDE

ADAPTERS = {"no adapter": [], "client adapter": [CLIENT], "and side adapter": [CLIENT, SIDE]}


class Launches(TorchDispatchMode):
    """Counts the operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not (looks or "empty" in str(func) or "view" in str(func))
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object]) -> int:
    """Return how many operations `work` starts."""
    with Launches() as launches:
        work()
    return launches.count


def launches(dtype: torch.dtype, adapters: list[str], *, fused: bool) -> tuple[int, int]:
    """Return the operations of a decoder layer's forward and backward pass."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    trains = frozenset("AB")
    base = MistralForCausalLM(config).to(dtype)
    model = lora_model.add_adapters(base, LoraSection(rank=8), trains=trains, fused=fused)
    if adapters:
        lora_model.activate(model, adapters, trains=trains)
    else:
        model.base_model.disable_adapter_layers()
    model.train()
    x = torch.randn(2, 16, 64, dtype=dtype, requires_grad=True)
    angles = base.model.rotary_emb(x, torch.arange(16)[None])
    layer, out = base.model.layers[0], []

    def forward() -> None:
        out.append(layer(x, position_embeddings=angles, attention_mask=None))

    with stacks_held(lora_model.lora_layers(model).values(), dtype):
        seen = count(forward)
        of_out = torch.ones_like(out[0])
        return seen, count(lambda: out[0].backward(of_out))


def benchmark(args: argparse.Namespace) -> None:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, adapters in ADAPTERS.items():
            for fused in (False, True) if adapters else (False,):
                forward, backward = launches(dtype, adapters, fused=fused)
                word = str(dtype).removeprefix("torch.")
                rows.append([word, name, "fused" if fused else "PEFT", forward, backward])
                print(f"{word}, {name}, {rows[-1][2]}: forward {forward}, backward {backward}")
    print(json.dumps({"benchmark": "launches", "rows": rows}))


if __name__ == "__main__":
    start(__doc__, benchmark)
