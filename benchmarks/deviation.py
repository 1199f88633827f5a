"""What measuring a round's deviation costs, against the training steps of the quickstart's round.

    .venv/bin/python benchmarks/deviation.py [--model models/SmolLM2-135M-Instruct] [--quick]

Three random clients of rank 32 on all projections of the model; the steps are plain PEFT's, on
batches of 8 examples of 67 tokens, 43 of them in a round.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import Figure, Ratio, in_turns, new_peft_model, quotients, report, start

from fedex_scale.aggregation.deviation import measure
from fedex_scale.config.learning import LoraSection
from fedex_scale.methods.algebra import Clients, Pair

LORA = LoraSection(rank=32, alpha=16)
CLIENTS, STEPS, BATCH, TOKENS = 3, 43, 8, 67


def benchmark(args: argparse.Namespace) -> None:
    model = new_peft_model(args.model, LORA).train()
    shapes = [
        (module.out_features, module.in_features)
        for module in model.modules()
        if hasattr(module, "lora_A")
    ]
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    draw = torch.randint(model.config.vocab_size, (BATCH, TOKENS))
    tokens = draw.to(next(model.parameters()).device)

    def steps() -> dict[str, float]:
        count = 1 if args.quick else 5
        began = time.perf_counter()
        for _ in range(count):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"43 steps": STEPS * (time.perf_counter() - began) / count}

    clients = layers(shapes)

    def deviations() -> dict[str, float]:
        began = time.perf_counter()
        for layer in clients:
            measure(layer, layer.pairs[0])
        return {"deviation": time.perf_counter() - began}

    steps()
    deviations()
    values = in_turns([steps, deviations], 1 if args.quick else 5)
    report(
        __file__,
        f"{args.model}, float32, LoRA of rank {LORA.rank} on {len(shapes)} layers",
        [Figure(name=name, values=seconds, unit="s") for name, seconds in values.items()],
        [
            Ratio(
                name="deviation / 43 steps",
                values=quotients(values["deviation"], values["43 steps"]),
                at_most=0.01,
            )
        ],
    )


def layers(shapes: list[tuple[int, int]]) -> list[Clients]:
    """Return the clients of each layer; layers of one shape share them."""
    pairs = {
        shape: [
            Pair(torch.randn(LORA.rank, shape[1]), torch.randn(shape[0], LORA.rank))
            for _ in range(CLIENTS)
        ]
        for shape in set(shapes)
    }
    weights = [1 / CLIENTS] * CLIENTS
    return [Clients(pairs[shape], weights, LORA.scaling) for shape in shapes]


if __name__ == "__main__":
    start(__doc__, benchmark)
