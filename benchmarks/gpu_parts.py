"""What benchmarks/gpu.py measures, each part in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedex_scale.aggregation.weights import as_stats, fold
from fedex_scale.config.learning import (
    DataConfig,
    EngineSection,
    LoraSection,
    ModelSection,
    TrainSection,
)
from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config
from fedex_scale.engine import models
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.engine.contents import fold_targets, read_pairs, set_side
from fedex_scale.engine.parameters import Source
from fedex_scale.engine.training import reset_for_client, train_step
from fedex_scale.federation.client import take_factors
from fedex_scale.methods.algebra import LowRank, Pair, compress
from fedex_scale.planning.choice import Sizes
from fedex_scale.planning.machine import this_machine
from fedex_scale.runtime import distributed

ROOT = Path(__file__).parents[1]
LENGTH, STEPS, RANK, CLIENTS = 512, 4, 32, 3
MOST = 16  # examples at once
CUDA = torch.cuda.is_available()


def measure(model: str, part: str) -> None:
    """Measure one part in this process, and print it."""

    deepspeed = str(ROOT / "ds_configs" / f"{part}.json") if part.startswith("zero") else None
    distributed.join_group(required=deepspeed is not None)
    if part == "trainer":
        setting, row = best_of_trainer(model)
    else:
        micro, checkpointing, planned, flops = choose(model, deepspeed)
        setting = f"micro-batch {micro}, checkpointing {checkpointing}"
        row = measure_ours(model, deepspeed, micro, checkpointing)
        if CUDA:
            row["planned"] = planned / 1e9
        if part == "ours":
            row["rate trained"] = row["tokens"] / (micro * LENGTH) * flops / 1e12
            row["rate of a matmul"] = matmul_rate() / 1e12
    print(json.dumps({"setting": setting, **row}))
    sys.stdout.flush()
    distributed.leave(0)


def config_of(model: str, deepspeed: str | None, micro: int, checkpointing: bool) -> Config:

    return Config(
        model=ModelSection(
            config=model,
            random=True,
            dtype="bfloat16" if CUDA else "float32",
            gradient_checkpointing=checkpointing,
        ),
        lora=LoraSection(rank=RANK),
        data=DataConfig(path="none.jsonl", max_length=LENGTH),
        train=TrainSection(batch_size=micro, micro_batch_tokens=micro * LENGTH),
        engine=EngineSection(deepspeed=deepspeed),
    )


def choose(model: str, deepspeed: str | None) -> tuple[int, bool, float, int]:
    """Return what `micro_batch_tokens: auto` takes.

    That is the micro-batch, whether with checkpointing, the planned bytes, and the FLOPs.

    With checkpointing only where less than two examples fit without it.
    """
    for checkpointing in (False, True):
        config = config_of(model, deepspeed, MOST, checkpointing)
        sizes = Sizes(config, this_machine())
        auto = replace(config, train=replace(config.train, micro_batch_tokens="auto"))
        filled = sizes.filled(auto)
        micro = filled.train.micro_batch_tokens // LENGTH
        if micro > 1:
            break
    # What torch allocates: the plan less what CUDA itself takes.
    needs = sizes.estimate(filled).needs
    planned = sum(need.gpu for need in needs if need.name != "processes")
    return micro, checkpointing, planned, sizes.work(filled).flops


def measure_ours(model: str, deepspeed: str | None, micro: int, checkpointing: bool) -> dict:

    config = config_of(model, deepspeed, micro, checkpointing)
    engine = build_engine(
        config.model,
        config.lora,
        config.engine,
        trains=frozenset("AB"),
        side_rank=(CLIENTS - 1) * RANK,
        optimizer="adamw",
        micro_batch_size=micro,
        accumulation=1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    batch = {name: value.cpu() for name, value in new_batch(micro).items()}

    def step() -> None:
        train_step(engine, [batch], units=micro * LENGTH, lr=1e-4)

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    step()  # makes the optimizer's state

    def rate() -> float:
        step()
        return micro * LENGTH * STEPS / seconds_of(lambda: [step() for _ in range(STEPS)])

    row = {"tokens": rate()}
    server = dict(read_pairs(engine)).__getitem__
    set_side(engine, random_side(engine))
    reset_for_client(engine, server, side=True)
    row["tokens with the side adapter"] = rate()
    if CUDA:
        row["peak"] = torch.cuda.max_memory_allocated() / 1e9
    reset_for_client(engine, server, side=False)
    if deepspeed is None:
        row |= measure_switch(engine) | measure_folds(engine)
    return row


def random_side(engine: Engine) -> Source:
    """Return a full side adapter, as it is after the first round."""
    columns = (CLIENTS - 1) * RANK
    return lambda layer: Pair(
        *(
            1e-3 * torch.randn(shape)
            for num_out, num_in in [engine.shapes()[layer]]
            for shape in ((columns, num_in), (num_out, columns))
        )
    )


def measure_switch(engine: Engine) -> dict[str, float]:
    """Time the end of one client and the beginning of the next: adapter out, adapter in.

    As in a run, the server's is held in memory, and the client's is written afterwards.
    """
    server = dict(read_pairs(engine)).__getitem__

    def switch() -> None:
        take_factors(engine, who="client")
        reset_for_client(engine, server, side=False)

    switch()
    return {"client switch": min(seconds_of(switch) for _ in range(3))}


def measure_folds(engine: Engine) -> dict[str, float]:
    """Time a fold into every layer in each mode, and a copy that reads and writes as much."""

    targets, shapes = fold_targets(engine), engine.shapes()
    columns = (CLIENTS - 1) * RANK
    factors = {
        name: LowRank(
            1e-3 * torch.randn(num_out, columns, device=engine.device),
            1e-3 * torch.randn(columns, num_in, device=engine.device),
        )
        for name, (num_out, num_in) in shapes.items()
    }

    def into_base(carry: bool) -> Callable[[], None]:
        # To read what the folds found is the one wait for all of them, as in a round.
        return lambda: as_stats(
            *(fold(targets[n], [piece], carry=carry) for n, piece in factors.items())
        )

    flats = [layer.get_base_layer().weight.data for layer in engine.layers.values()]
    room = torch.empty_like(max(flats, key=lambda flat: flat.numel())).view(-1)
    runs = {
        "copy of the folded weights": lambda: [room[: f.numel()].copy_(f.view(-1)) for f in flats],
        "fold: round": into_base(False),
        "fold: carry": into_base(True),
        "fold: side": lambda: side_of_all(engine, factors),
    }
    for run in runs.values():
        run()
    return {name: min(seconds_of(run) for _ in range(3)) for name, run in runs.items()}


def side_of_all(engine: Engine, factors: dict[str, LowRank]) -> None:
    """Compress every residual into the side adapter's rank, as a round does."""

    def side(layer: str) -> Pair:
        kept, _ = compress(factors[layer], (CLIENTS - 1) * RANK)
        return Pair(kept.V_PI, kept.U_OP)

    set_side(engine, side)


def best_of_trainer(model: str) -> tuple[str, dict]:
    """Return the Trainer's best setting, of those that fit, and its tokens/s.

    Without checkpointing, as far as memory goes; with it where not even one example fits.
    """
    found: dict[str, float] = {}
    for checkpointing in (False, True):
        for micro in (1, 2, 4, 8, MOST) if CUDA else (2,):
            try:
                rate = train_trainer(model, micro, checkpointing)
            except torch.OutOfMemoryError:
                break
            found[f"micro-batch {micro}, checkpointing {checkpointing}"] = rate
        if found:
            break
    setting = max(found, key=found.__getitem__)
    return setting, {"tokens": found[setting]}


def train_trainer(model: str, micro: int, checkpointing: bool) -> float:
    """Return tokens/s of transformers' Trainer with PEFT, from the end of the first step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = config_of(model, None, micro, checkpointing)
    settings = models.base_config(config.model)
    with torch.device("cuda" if CUDA else "cpu"):
        base = AutoModelForCausalLM.from_config(
            settings,
            dtype=models.resolve_dtype(config.model),
            attn_implementation=models.attention(config.model, settings),
        )
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    ends: list[float] = []

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            sync()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            per_device_train_batch_size=micro,
            max_steps=1 + STEPS,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=CUDA,
            use_cpu=not CUDA,
        )
        rows = [{k: v[0] for k, v in new_batch(1).items()} for _ in range(micro * (1 + STEPS))]
        peft_model = get_peft_model(base, lora)
        if checkpointing:
            peft_model.enable_input_require_grads()
        Trainer(peft_model, arguments, train_dataset=rows, callbacks=[Ticks()]).train()
    return micro * LENGTH * STEPS / (ends[-1] - ends[0])


def new_batch(examples: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, 300, (examples, LENGTH))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def matmul_rate() -> float:
    """Return the FLOPs a second of a large square product."""
    size, dtype = (8192, torch.bfloat16) if CUDA else (256, torch.float32)
    a, b = (torch.randn(size, size, device="cuda" if CUDA else "cpu", dtype=dtype) for _ in "ab")
    (a @ b).sum()
    return 20 * 2 * size**3 / seconds_of(lambda: [a @ b for _ in range(20)])


def seconds_of(call: Callable[[], object]) -> float:
    sync()
    began = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - began


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()
