"""How fast one engine goes from client to client, against building the model anew for each.

    .venv/bin/python benchmarks/client_switch.py [--model models/SmolLM2-135M-Instruct] [--quick]

A switch lasts from the end of a client's last step to the start of the next one's first: write
the finished client's adapter, give the engine the server's, forget the optimizer's state, plan
the data, seed, and collate the first batch. Building anew is `from_pretrained`, `get_peft_model`
and a new optimizer. The authors' code then loads the server's whole state dict, too: that is the
second ratio. It saves no client's adapter, as it holds all clients in memory.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import Figure, Ratio, in_turns, new_peft_model, quotients, report, start
from torch import Tensor

from fedex_scale import client
from fedex_scale.adapters import Adapter, LoraSection
from fedex_scale.algebra import Pair
from fedex_scale.data.batching import Examples
from fedex_scale.engine import Engine, EngineSection, build_engine
from fedex_scale.methods import fresh_pair
from fedex_scale.models import ModelSection

LORA = LoraSection(rank=32, alpha=16)
NUM_EXAMPLES = 3_333  # of one client: the paper's 10,000 over 3
WATCHED = ("train_step", "reset_for_client")


def benchmark(args: argparse.Namespace) -> None:
    engine = build_engine(
        ModelSection(path=args.model, dtype="float32"),
        LORA,
        EngineSection(),
        trains=frozenset("AB"),
        side_rank=2 * LORA.rank,  # what a fedex run with 3 clients has
        optimizer="adamw",
        micro_batch_size=1,
        accumulation=1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    state = new_peft_model(args.model, LORA).state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        server, out = Path(scratch) / "server", Path(scratch) / "clients"
        write_server(engine, server, args.model)
        examples = random_examples(NUM_EXAMPLES)

        def switch() -> dict[str, float]:
            return measure_switch(engine, examples, server, out, args.model)

        switch()  # warms up
        values = in_turns([lambda: build_anew(args.model, state), switch], 2 if args.quick else 9)
    anew, loaded, own = (values[name] for name in ("anew", "anew, server's state loaded", "switch"))
    report(
        __file__,
        f"{args.model}, float32, LoRA of rank {LORA.rank} on {len(engine.layers)} layers",
        [Figure(name=name, values=ms, unit="ms") for name, ms in values.items()],
        [
            Ratio(name="anew / switch", values=quotients(anew, own), at_least=20),
            Ratio(name="anew, server's state loaded / switch", values=quotients(loaded, own)),
        ],
    )


def build_anew(model: str, state: dict[str, Tensor]) -> dict[str, float]:
    """Return the milliseconds that a new model, wrapper and optimizer take."""
    began = time.perf_counter()
    peft_model = new_peft_model(model, LORA)
    torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad])
    built = time.perf_counter()
    peft_model.load_state_dict(state)
    loaded = time.perf_counter()
    del peft_model
    gc.collect()
    return {"anew": 1e3 * (built - began), "anew, server's state loaded": 1e3 * (loaded - began)}


def measure_switch(
    engine: Engine, examples: Examples, server: Path, out: Path, base: str
) -> dict[str, float]:
    """Train two clients for one short step each; return the milliseconds between the steps."""
    section = client.TrainSection(batch_size=1, max_steps=1, warmup_ratio=0.0)
    with watch(*WATCHED) as calls:
        for number in range(2):
            update = client.train_client(
                engine,
                examples,
                Adapter(server).pair,
                section,
                seed=0,
                round=1,
                client=number,
                side=False,
                pad_id=0,
                on_step=lambda fields: None,
            )
            ended = time.perf_counter()
            client.write_client(engine, update, out / str(number), LORA, base)
            if number == 0:
                write_s = time.perf_counter() - ended
    (_, begin), (end, _) = calls["train_step"]
    reset_begin, reset_end = calls["reset_for_client"][1]
    shutil.rmtree(out)  # a run writes new files and no file twice
    return {
        "switch": 1e3 * (end - begin),
        "  write the client's adapter": 1e3 * write_s,
        "  give the engine the server's": 1e3 * (reset_end - reset_begin),
        "  plan, seed, collate": 1e3 * (end - reset_end),
    }


def write_server(engine: Engine, directory: Path, base: str) -> None:
    """Write an adapter that clients can begin with."""
    generator = torch.Generator().manual_seed(0)
    with client.open_adapter(engine, directory, LORA, base) as writer:
        for layer, (num_out, num_in) in engine.shapes().items():
            like = Pair(torch.empty(LORA.rank, num_in), torch.empty(num_out, LORA.rank))
            writer.write(layer, fresh_pair(like, generator))


def random_examples(count: int) -> Examples:
    """Return examples of 8 to 16 random tokens, so that a step is short."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(8, 17, count)
    return Examples(
        tokens=draw.integers(3, 300, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=lengths // 2,
        rows=np.arange(count),
    )


@contextmanager
def watch(*names: str) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Note when each call of these functions by client.py begins and ends."""
    calls: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in names:
            timed = _timed(getattr(client, name), calls[name])
            stack.enter_context(patch.object(client, name, timed))
        yield calls


def _timed(function: Callable, calls: list[tuple[float, float]]) -> Callable:
    def call(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        calls.append((began, time.perf_counter()))
        return result

    return call


if __name__ == "__main__":
    start(__doc__, benchmark)
