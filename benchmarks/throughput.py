"""How fast a client trains, against transformers' Trainer, padding to the maximum, and packing.

    .venv/bin/python benchmarks/throughput.py [--model models/SmolLM2-135M-Instruct] [--quick]

Non-pad tokens a second, from the end of the first optimizer step to the end of the last. All four
train the same adapter from the same start on the same micro-batches in the same order, in float32;
so their losses are compared as well, step by step. The examples are as long as MetaMathQA's in the
project's prompt, scaled to --max-length, which is half the paper's 512 unless told otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from common import Figure, Ratio, in_turns, new_peft_model, quotients, report, start
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedex_scale.config.learning import EngineSection, LoraSection, ModelSection, TrainSection
from fedex_scale.config.section import replace
from fedex_scale.data import batching
from fedex_scale.data.batching import MASKED, Examples, collate, plan_steps
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.engine.lora_model import CLIENT, lora_layers
from fedex_scale.federation.client import train_client
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.instruct import Tokens

LORA = LoraSection(rank=32, alpha=16)
TRAIN = TrainSection(batch_size=8, micro_batch_size=4)
NUM_STEPS, SEED, PAD = 3, 0, 0
# Lengths are log-normal. GSM8K's rows have a median of 209 tokens and a log-spread of 0.29 in the
# project's prompt; MetaMathQA mixes such rows with MATH's, which vary more.
MEDIAN_LENGTH, LENGTH_SPREAD, PAPER_MAX_LENGTH = 190, 0.4, 512


@dataclass
class Clock:
    """When each step ended, and how many tokens it had."""

    times_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def tick(self, num_tokens: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times_s.append(time.perf_counter())
        self.num_tokens.append(num_tokens)

    def tokens_per_s(self) -> float:
        """Return the speed after the first step, which allocates the optimizer's state."""
        return sum(self.num_tokens[1:]) / (self.times_s[-1] - self.times_s[0])


def benchmark(args: argparse.Namespace) -> None:
    longest = 64 if args.quick else args.max_length
    torch.manual_seed(SEED)
    engine, peft_model = plain_engine(args.model), new_peft_model(args.model, LORA)
    begin = pairs_of(peft_model)
    examples = random_examples(NUM_STEPS * TRAIN.batch_size, longest)
    padded, packed = f"ours, padded to {longest}", "ours, packed"
    packing = replace(TRAIN, packing=True)
    runs = {
        "ours": lambda: train_ours(engine, examples, begin, collate),
        "Trainer + PEFT": lambda: train_trainer(peft_model, examples, begin),
        padded: lambda: train_ours(engine, examples, begin, partial(collate_to, longest)),
        packed: lambda: train_ours(engine, examples, begin, collate, packing),
    }
    losses: dict[str, list[float]] = {}

    def measure(name: str) -> dict[str, float]:
        losses[name], speed = runs[name]()
        return {name: speed}

    speeds = in_turns([partial(measure, name) for name in runs], 1 if args.quick else 5)
    report(
        __file__,
        f"{args.model}, float32, LoRA of rank {LORA.rank}, {TRAIN.batch_size} examples a step in "
        f"micro-batches of {TRAIN.micro_batch_size}, {np.median(examples.lengths):.0f} tokens at "
        f"the median and {examples.lengths.max()} at most",
        [Figure(name=name, values=values, unit="tokens/s") for name, values in speeds.items()],
        [
            Ratio(name=f"ours / {name}", values=quotients(speeds["ours"], speeds[name]), at_least=x)
            for name, x in (("Trainer + PEFT", 0.98), (padded, 1.5))
        ]
        + [Ratio(name=f"{packed} / ours", values=quotients(speeds[packed], speeds["ours"]))],
        losses=losses["ours"],
        largest_loss_difference={
            name: max(abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True))
            for name in ("Trainer + PEFT", padded, packed)
        },
    )


def train_ours(
    engine: Engine,
    examples: Examples,
    begin: dict[str, Pair],
    collate: Callable,
    section: TrainSection = TRAIN,
) -> tuple[list[float], float]:
    """Train one client; return each step's loss, and tokens a second."""
    losses, clock = [], Clock()

    def on_step(fields: dict) -> None:
        clock.tick(fields["tokens"])
        losses.append(fields["loss"])

    with patch.object(batching, "collate", collate):
        train_client(
            engine,
            Tokens(examples, pad_id=PAD, packing=section.packing),
            lambda layer: begin[layer],
            section,
            seed=SEED,
            round=1,
            client=0,
            side=False,
            on_step=on_step,
        )
    return losses, clock.tokens_per_s()


def train_trainer(
    peft_model: PeftModel, examples: Examples, begin: dict[str, Pair]
) -> tuple[list[float], float]:
    """Train as `train_ours` does, with the Trainer."""
    with torch.no_grad():
        for name, pair in pairs_of(peft_model, copy=False).items():
            for mine, value in zip(pair, begin[name], strict=True):
                mine.copy_(value)
    steps = plan_steps(
        examples.lengths,
        batch_size=TRAIN.batch_size,
        epochs=TRAIN.local_epochs,
        seed=derive_seed(SEED, "order", 1, 0),
    )
    micro_losses, clock = [], Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            clock.tick(int(examples.lengths[steps[state.global_step - 1]].sum()))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            peft_model,
            trainer_arguments(scratch),
            data_collator=lambda part: collate(examples, part, fallback=part[0], pad_id=PAD),
            train_dataset=[index for step in steps for index in step],
            callbacks=[Ticks()],
        )
        trainer.remove_callback(PrinterCallback)
        training_step = trainer.training_step

        def noted(*args, **kwargs) -> Tensor:
            micro_losses.append(training_step(*args, **kwargs))
            return micro_losses[-1]

        trainer.training_step = noted
        trainer.train()
    by_step = torch.stack(micro_losses).double().view(len(steps), -1)
    return by_step.sum(dim=1).tolist(), clock.tokens_per_s()


def trainer_arguments(directory: str) -> TrainingArguments:
    """Return `TRAIN` in the Trainer's words."""
    return TrainingArguments(
        directory,
        per_device_train_batch_size=TRAIN.micro_batch_size,
        gradient_accumulation_steps=TRAIN.batch_size // TRAIN.micro_batch_size,
        num_train_epochs=TRAIN.local_epochs,
        learning_rate=TRAIN.learning_rate,
        lr_scheduler_type=TRAIN.schedule,
        warmup_steps=TRAIN.warmup_ratio,
        weight_decay=TRAIN.weight_decay,
        max_grad_norm=TRAIN.max_grad_norm,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def plain_engine(model: str) -> Engine:
    return build_engine(
        ModelSection(path=model, dtype="float32"),
        LORA,
        EngineSection(),
        trains=frozenset("AB"),
        side_rank=0,
        optimizer=TRAIN.optimizer,
        micro_batch_size=TRAIN.micro_batch_size,
        accumulation=TRAIN.batch_size // TRAIN.micro_batch_size,
        weight_decay=TRAIN.weight_decay,
        max_grad_norm=TRAIN.max_grad_norm,
    )


def pairs_of(peft_model: PeftModel, *, copy: bool = True) -> dict[str, Pair]:
    """Return every layer's factors, or copies of them."""
    pairs = {}
    for name, layer in lora_layers(peft_model).items():
        factors = layer.lora_A[CLIENT].weight.detach(), layer.lora_B[CLIENT].weight.detach()
        pairs[name] = Pair(*(x.clone() if copy else x for x in factors))
    return pairs


def collate_to(longest: int, *args, **kwargs) -> dict[str, Tensor]:
    """Return a micro-batch padded to `longest`, and no longer only to its own longest example."""
    fill = {"input_ids": PAD, "labels": MASKED, "attention_mask": 0}
    batch = collate(*args, **kwargs)
    return {k: pad(x, (0, longest - x.shape[1]), value=fill[k]) for k, x in batch.items()}


def random_examples(count: int, longest: int) -> Examples:
    """Return examples of random tokens, as long as MetaMathQA's times `longest` / 512.

    The lengths are the distribution's quantiles and no draw of it, which would be small.
    """
    normal = torch.special.ndtri((torch.arange(count) + 0.5).double() / count).numpy()
    lengths = MEDIAN_LENGTH * np.exp(LENGTH_SPREAD * normal) * longest / PAPER_MAX_LENGTH
    lengths = np.clip(lengths, 4, longest).astype(np.int64)
    draw = np.random.default_rng(SEED)
    return Examples(
        tokens=draw.integers(3, 300, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        prompt_lengths=lengths // 2,
        rows=np.arange(count),
    )


if __name__ == "__main__":
    start(
        __doc__,
        benchmark,
        max_length={"type": int, "default": 256, "help": "tokens (%(default)s)"},
    )
