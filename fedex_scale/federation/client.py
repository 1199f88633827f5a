"""Train one client on the shared engine, and hand over its adapter."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import transformers
from torch import Tensor

from fedex_scale.config.learning import LoraSection, TrainSection
from fedex_scale.data.batching import plan_steps, shard, shard_by_tokens
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import read_pairs, set_adapter, set_side
from fedex_scale.engine.parameters import Source
from fedex_scale.engine.training import reset_for_client, train_step
from fedex_scale.federation.facts import open_adapter
from fedex_scale.federation.history import History
from fedex_scale.federation.state import ClientProgress, ServerState
from fedex_scale.files import checked, kinds
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import Pair, all_finite
from fedex_scale.runtime import distributed, faults, phases
from fedex_scale.runtime.errors import ClientFailure
from fedex_scale.runtime.phases import phase
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.interface import Examples

CLIENT_FILE = "client.json"


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What a client sends, besides its adapter: saved as client.json beside it."""

    round: int
    client: int
    num_examples: int
    num_steps: int
    num_tokens: int
    first_loss: float
    last_loss: float
    seconds: float


def num_steps(num_examples: int, section: TrainSection) -> int:
    """Return the optimizer steps of a client with so many examples, in one round."""
    steps = -(-num_examples // section.batch_size) * section.local_epochs
    return min(steps, section.max_steps or steps)


def learning_rate(step: int, num_steps: int, section: TrainSection) -> float:
    """Return the rate of a step (from 0): linear warmup, then the schedule down to 0.

    The same curves as transformers' `get_scheduler`; a function of the step, so that nothing has
    to be reset between clients or saved in a checkpoint.
    """
    # A client of one step would otherwise only warm up, and train nothing.
    warmup = math.ceil(num_steps * section.warmup_ratio) if num_steps > 1 else 0
    if step < warmup:
        return section.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[section.schedule]
    return section.learning_rate * factor


@phase("folding")
def show(engine: Engine, run: RunDir, state: ServerState) -> None:
    """Let the engine hold what clients train on: the server's adapter, and the side adapter."""
    if state.has_side and not engine.has_planes:
        set_side(engine, History(run, state.round).side)
    set_adapter(engine, Adapter(run.adapter(state.round)).weights, side=state.has_side)


def train_client(
    engine: Engine,
    examples: Examples,
    start: Source,
    section: TrainSection,
    *,
    seed: int,
    round: int,
    client: int,
    side: bool,
    on_step: Callable[[dict], None],
    begin: ClientProgress | None = None,
    restore: Callable[[], None] = lambda: None,
    save: Callable[[ClientProgress], None] = lambda progress: None,
) -> ClientUpdate:
    """Train one client from the server's adapter; the engine then holds the client's.

    The result depends on the examples, the start, and (seed, round, client), and not on what the
    engine did before.

    Args:
        start: the adapter to begin with, by layer.
        side: whether the side adapter takes part in the forward pass.
        on_step: called on every rank after each step with step, loss, lr and tokens.
        begin: where a checkpoint left the client, whose adapter is then `start`.
        restore: sets the rest of what that checkpoint holds, on every rank.
        save: called on every rank after each step; may write a checkpoint, or stop the run.

    Raises:
        ClientFailure: the loss is no longer finite.
    """
    progress = begin or ClientProgress(client=client)
    began = time.perf_counter() - progress.seconds
    again = ("again", progress.attempt) if progress.attempt else ()
    with phase("client switch"):
        reset_for_client(engine, start, side=side)
    steps = plan_steps(
        examples.lengths,
        batch_size=section.batch_size,
        epochs=section.local_epochs,
        seed=derive_seed(seed, "order", round, client, *again),
        group_by_length=section.group_by_length,
    )[: section.max_steps]
    transformers.set_seed(derive_seed(seed, "train", round, client, distributed.rank(), *again))
    if progress.step:
        restore()
    with faults.deferring(), phase("training"):
        for step in range(progress.step, len(steps)):
            indices, lr = steps[step], learning_rate(step, len(steps), section)
            units = int(examples.units[indices].sum())
            batches = list(_micro_batches(examples, indices, section))
            with phases.step():
                loss = train_step(engine, batches, units=units, lr=lr)
            if not math.isfinite(loss):
                raise ClientFailure(
                    f"round {round}, client {client}, step {step + 1}: expected a finite loss, got "
                    f"{loss}; lower train.learning_rate or look at this client's data"
                )
            tokens = int(examples.lengths[indices].sum())
            progress = replace(
                progress,
                step=step + 1,
                num_tokens=progress.num_tokens + tokens,
                first_loss=progress.first_loss if step else loss,
                last_loss=loss,
                seconds=time.perf_counter() - began,
            )
            place = {"round": round, "client": client, "step": step + 1, "steps": len(steps)}
            on_step({**place, "loss": loss, "lr": lr, "tokens": tokens})
            save(progress)
    return ClientUpdate(
        round=round,
        client=client,
        num_examples=len(examples),
        num_steps=len(steps),
        num_tokens=progress.num_tokens,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        seconds=progress.seconds,
    )


def take_factors(engine: Engine, *, who: str) -> dict[str, Pair | Tensor]:
    """Return the adapter that the engine holds, on rank 0; every rank must take part.

    It stays as it is when the engine goes on to another client.

    Args:
        who: whose it is, for an error.

    Raises:
        ClientFailure: it is not finite.
    """
    pairs = _finite_pairs(engine, who=who)
    return {layer: pair for layer, pair in pairs if distributed.is_main()}


def write_client(
    engine: Engine,
    update: ClientUpdate,
    factors: Mapping[str, Pair | Tensor],
    directory: Path,
    lora: LoraSection,
    base: str,
) -> None:
    """Write what a client sends as a PEFT directory; rank 0 alone, and in any thread."""
    with open_adapter(engine, directory, lora, base) as writer:
        writer.write_all(factors)
    (directory / CLIENT_FILE).write_text(json.dumps(asdict(update), indent=2) + "\n")


def read_update(directory: Path) -> ClientUpdate:
    """Return what `write_client` wrote beside the adapter."""
    found = checked.read(kinds.ClientFile, directory / CLIENT_FILE)
    return ClientUpdate(
        **{field.name: getattr(found, field.name) for field in fields(ClientUpdate)}
    )


def write_adapter(
    engine: Engine, directory: Path, lora: LoraSection, base: str, *, who: str
) -> None:
    """Write the adapter that the engine holds; every rank must take part.

    Args:
        who: whose it is, for an error.

    Raises:
        ClientFailure: it is not finite.
    """
    with ExitStack() as stack:
        write = None
        if distributed.is_main():
            write = stack.enter_context(open_adapter(engine, directory, lora, base)).write
        for layer, pair in _finite_pairs(engine, who=who):
            if write is not None:
                write(layer, pair)


def _finite_pairs(engine: Engine, *, who: str) -> Iterator[tuple[str, Pair | Tensor]]:
    for layer, pair in read_pairs(engine, copy=False):
        if not all_finite(*pair):
            raise ClientFailure(
                f"{who}, layer {layer}: expected finite factors, got NaN or Inf; "
                "lower train.learning_rate or look at its data"
            )
        yield layer, pair
    for name, weight in engine.whole_weights(copy=False):
        if not all_finite(weight):
            raise ClientFailure(
                f"{who}, {name}: expected finite numbers, got NaN or Inf; lower "
                "train.learning_rate or look at its data"
            )
        yield name, weight


def _micro_batches(
    examples: Examples, indices: list[int], section: TrainSection
) -> Iterator[dict[str, Tensor]]:
    place = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    if section.micro_batch_tokens is None:
        parts = shard(indices, micro_batch_size=section.micro_batch_size, **place)
    else:
        limit, packing = section.micro_batch_tokens, section.packing
        parts = shard_by_tokens(
            indices, examples.lengths, max_tokens=limit, packing=packing, **place
        )
    for part in parts:
        yield examples.batch(part, fallback=indices[0])
