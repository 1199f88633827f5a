"""How fast one engine goes from client to client, against building the model anew for each.

    .venv/bin/python benchmarks/client_switch.py [--model models/SmolLM2-135M-Instruct] [--quick]

Watched in the round loop itself, with clients of three short steps. A switch lasts from the end of
a client's last step to the start of the next one's first: take the finished client's adapter, which
is written and saved while the next one trains, give the engine the server's, forget the optimizer's
state, plan the data, seed, and collate the first batch. Building anew is `from_pretrained`,
`get_peft_model` and a new optimizer. The authors' code then loads the server's whole state dict,
too: that is the second ratio. It saves no client's adapter, as it holds all clients in memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from common import Figure, Ratio, in_turns, new_peft_model, quotients, report, start
from torch import Tensor

from fedex_scale import rounds
from fedex_scale.config.federation import FederationSection
from fedex_scale.config.learning import DataConfig, LoraSection, ModelSection, TrainSection
from fedex_scale.config.settings import Config, RunSection
from fedex_scale.data.batching import Examples
from fedex_scale.engine.build import Engine
from fedex_scale.federation import client, saves
from fedex_scale.federation.directory import make_directory
from fedex_scale.federation.saves import Saver
from fedex_scale.files.run_dir import RunDir
from fedex_scale.run import engine_for
from fedex_scale.tasks.instruct import Tokens

LORA = LoraSection(rank=32, alpha=16)
CLIENTS, STEPS = 6, 3
NUM_EXAMPLES = 3_333  # of one client: the paper's 10,000 over 3


def benchmark(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = Config(
            run=RunSection(dir=scratch),
            model=ModelSection(path=args.model, dtype="float32"),
            data=DataConfig(path="none"),
            lora=LORA,
            train=TrainSection(batch_size=8, micro_batch_size=8, max_steps=STEPS),
            federation=FederationSection(rounds=1),
        )
        engine = engine_for(config, CLIENTS)
        state = new_peft_model(args.model, LORA).state_dict()
        examples = [random_examples(NUM_EXAMPLES) for _ in range(CLIENTS)]

        def switch() -> dict[str, float]:
            return measure_switches(config, engine, examples)

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


def measure_switches(config: Config, engine: Engine, clients: list[Tokens]) -> dict[str, float]:
    """Do a round of a few short steps; return the milliseconds of a switch, and of its parts."""
    run = RunDir(config.run.path)
    make_directory(config, run, "{}")
    with ExitStack() as stack:
        steps = stack.enter_context(watch(client, "train_step"))
        resets = stack.enter_context(watch(client, "reset_for_client"))
        taken = stack.enter_context(watch(saves, "take_factors"))
        written = stack.enter_context(watch(saves, "write_client"))
        saved = stack.enter_context(watch(saves.checkpoint, "publish"))
        saver = stack.enter_context(Saver(config, engine, run, None))
        rounds.run_rounds(
            config,
            engine,
            clients,
            run,
            saver,
            evaluate=lambda round: None,
            log=lambda event, **fields: None,
        )
    firsts = [steps[k * STEPS][0] for k in range(1, CLIENTS)]
    lasts = [steps[k * STEPS - 1][1] for k in range(1, CLIENTS)]

    def typical(values: Iterator[float]) -> float:
        return 1e3 * median(values)

    return {
        "switch": typical(first - last for first, last in zip(firsts, lasts, strict=True)),
        "  take the client's adapter": typical(end - begin for begin, end in taken),
        "  give the engine the server's": typical(end - begin for begin, end in resets[1:]),
        "  plan, seed, collate": typical(
            first - end for first, (_, end) in zip(firsts, resets[1:], strict=True)
        ),
        "in the background: write the client's": typical(end - begin for begin, end in written),
        "in the background: save the run's place": typical(
            end - begin for begin, end in saved[1 : CLIENTS + 1]
        ),
    }


def random_examples(count: int) -> Tokens:
    """Return examples of 8 to 16 random tokens, so that a step is short."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(8, 17, count)
    examples = Examples(
        tokens=draw.integers(3, 300, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=lengths // 2,
        rows=np.arange(count),
    )
    return Tokens(examples, pad_id=0)


@contextmanager
def watch(module: object, name: str) -> Iterator[list[tuple[float, float]]]:
    """Note when each call of a function of this module begins and ends."""
    calls: list[tuple[float, float]] = []
    with patch.object(module, name, _timed(getattr(module, name), calls)):
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
