"""One run, from its config to its final files: prepare, train round by round, export."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedex_scale.aggregation.ranks import base_update_rank, side_rank_of
from fedex_scale.config.load import Source, load_config
from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.engine import lora_model, models
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.engine.ds_config import zero_stage
from fedex_scale.engine.training import moments_away
from fedex_scale.federation.checkpoint import Checkpoint
from fedex_scale.federation.client import num_steps
from fedex_scale.federation.directory import (
    check_base,
    check_directory,
    check_head,
    check_shared,
    held,
    prepare_directory,
    restore_config,
)
from fedex_scale.federation.final import show_handed_over, write_final
from fedex_scale.federation.resume import Found, check_place
from fedex_scale.federation.saves import Saver
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.all import METHODS
from fedex_scale.planning import choice, room
from fedex_scale.reporting import card, page, record, serving
from fedex_scale.rounds import choose_clients, run_rounds
from fedex_scale.runtime import distributed, faults, phases
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.phases import phase, profiling
from fedex_scale.runtime.progress import Monitor
from fedex_scale.runtime.text import one_line
from fedex_scale.runtime.trackers import Trackers
from fedex_scale.runtime.waiting import waiting
from fedex_scale.scoring import asked, evaluation
from fedex_scale.scoring.look import Look
from fedex_scale.tasks.all import Lesson, kind_without_rows, read_lesson
from fedex_scale.tasks.interface import CAUSAL, Examples, ModelKind


def run_config(source: Source, overrides: Sequence[str] | Mapping[str, Any] | None = None) -> Path:
    """Do a run and return its directory; every rank of the launcher calls this.

    Args:
        source, overrides: as `load_config` takes them.

    Raises:
        UserError: what the user can put right, on every rank; before anything is written or
            trained where it can be known by then.
    """
    config = load_config(source, overrides)
    phases.start()
    distributed.join_group(required=config.engine.deepspeed is not None)
    faults.watch_peers()
    with (
        faults.handling_signals(),
        profiling(config.run.profile_steps, config.run.path / "profile"),
    ):
        _run_or_resume(config)
    return config.run.path


def _run_or_resume(config: Config) -> None:
    run = RunDir(config.run.path)
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(held(run)) and None)
        found = distributed.on_main(lambda: check_directory(config))
        if found.checkpoint is not None and found.checkpoint.place.finished:
            distributed.on_main(lambda: restore_config(run, found.checkpoint))
            for note in found.notes[:-1]:
                _tell(note)
            more = config.federation.rounds + 1
            _tell(
                f"{run.path}: this run is finished; nothing to do (federation.rounds={more}, or "
                "more, goes on with it)"
            )
            return
        _load_and_run(config, run, found)


def _load_and_run(config: Config, run: RunDir, found: Found) -> None:
    with Trackers(config.run.trackers, run.path) as trackers, ThreadPoolExecutor(1) as thread:
        with phase("load"), waiting("reading the data and loading the model"):
            distributed.together(lambda: check_evaluation(config))
            if config.train.packing:
                distributed.together(lambda: models.check_packing(config.model))
            kind = kind_without_rows(config)
            distributed.together(lambda: models.check_kind(config.model, kind))
            processor = distributed.together(lambda: models.load_processor(config.model, kind))
            # Once it is known that the model can be had.
            digests = thread.submit(_digests, config) if distributed.is_main() else None
            lesson = distributed.together(lambda: load_lesson(config, processor))
            clients = lesson.clients
            for note in clients.notes:
                _tell(note)
            config = settle(config, found)
            warning = distributed.on_main(lambda: choice.warning(config))
            if warning:
                _tell(warning)
            distributed.on_main(lambda: trackers.open(to_dict(config)))
            engine = distributed.together(
                lambda: engine_for(config, len(clients.train), lesson.model)
            )
            distributed.on_main(lambda: check_base(config, digests.result(), found.checkpoint))
            if found.checkpoint is not None:
                begun = Adapter(run.adapter(0))
                distributed.together(lambda: check_head(begun, engine.whole_shapes()))
            distributed.on_main(
                lambda: prepare_directory(config, run, clients.report, found.checkpoint)
            )
            check_shared(run.path)
        for note in found.notes:
            _tell(note)
        base, tokenizer = digests.result() if digests else {}, processor
        if config.task.has_head:
            tokenizer = None
        _run(config, engine, tokenizer, lesson, run, found.checkpoint, trackers, base)


def _digests(config: Config) -> dict[str, tuple[int, str]]:
    return models.digests(config.model) | evaluation.digests(config.evaluation)


def settle(config: Config, found: Found) -> Config:
    """Return the config with what a run was begun with, or has room for here, in place of auto."""
    begun = found.checkpoint.config if found.checkpoint is not None else None
    settled = room.settled(config, begun)
    told = {
        "aggregate.side_rank": "side adapter: room for {} columns here",
        "train.micro_batch_tokens": "micro-batches: room for {} tokens at once here",
    }
    for name, line in told.items() if begun is None else ():
        section, _, key = name.partition(".")
        before, now = (getattr(getattr(c, section), key) for c in (config, settled))
        if before != now:
            _tell(f"{line.format(now)} ({name})")
    return settled


def check_evaluation(config: Config) -> None:
    """Raise a UserError where the model could be trained but not scored."""
    partitioned = zero_stage(config.engine) == 3
    evaluation.check_batch_size(config.evaluation, partitioned=partitioned)
    evaluation.check_tasks(config.evaluation, models.positions(config.model))
    if config.evaluation.generate:
        asked.read_prompts(config.evaluation.generate)


def load_lesson(config: Config, processor: Any) -> Lesson:
    """Return what is learned from which examples."""
    lesson = read_lesson(config, processor)
    if lesson.largest_token:
        models.check_vocabulary(config.model, lesson.largest_token)
        models.check_lengths(config.model, lesson.longest)
    return lesson


def engine_for(config: Config, num_clients: int, kind: ModelKind = CAUSAL) -> Engine:
    """Build the run's engine."""
    chosen = len(choose_clients(config.federation, num_clients, config.run.seed, 1))
    side_rank = side_rank_of(
        config.method, config.aggregate, chosen, config.lora.rank, config.federation.rounds
    )
    adds = base_update_rank(config.method, chosen, config.lora.rank) > 0
    has_planes = adds and config.aggregate.fold == "planes"
    engine = engine_with(config, side_rank=side_rank, has_planes=has_planes, kind=kind)
    tied = lora_model.tied_layers(engine.model)
    if tied and adds and config.aggregate.fold != "side":
        raise UserError(
            f"lora.target_modules: layer {tied[0]}: its weight is the embedding's too, which what "
            f"{config.method.name} adds to the base would change; leave {tied[0]} out, or use "
            "aggregate.fold=side, which leaves the base as it is"
        )
    return engine


def engine_with(
    config: Config, *, side_rank: int, has_planes: bool = False, kind: ModelKind = CAUSAL
) -> Engine:
    """Build an engine to train clients on, with room for a side adapter or planes."""
    train = config.train
    at_once = train.at_once(config.data.max_length)
    return build_engine(
        config.model,
        config.lora,
        config.engine,
        trains=METHODS[config.method.name].trains,
        side_rank=side_rank,
        has_planes=has_planes,
        optimizer=train.optimizer,
        micro_batch_size=at_once,
        accumulation=max(1, -(-train.batch_size // (at_once * distributed.world_size()))),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        kind=dataclasses.replace(kind, everything=config.method.name == "full"),
    )


def _run(
    config: Config,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    lesson: Lesson,
    run: RunDir,
    last: Checkpoint | None,
    trackers: Trackers,
    base: dict[str, tuple[int, str]],
) -> None:
    rounds, seed, clients = config.federation.rounds, config.run.seed, lesson.clients.train
    plan = [
        {client: num_steps(len(clients[client]), config.train) for client in chosen}
        for chosen in (
            choose_clients(config.federation, len(clients), seed, round)
            for round in range(1, rounds + 1)
        )
    ]
    check_place(run, last, plan)
    with (
        Saver(config, engine, run, last, base) as saver,
        Monitor(run.metrics, plan=plan, trackers=trackers) as monitor,
    ):
        monitor.say(_intro(config, engine, clients))

        known = _facts(engine)

        def keep_record(round: int | None) -> None:
            monitor.log("phases", round=round, **phases.lap())
            with phase("writing"):
                distributed.on_main(lambda: record.write(run, known))

        own = config.evaluation.generate
        prompts = distributed.on_main(lambda: asked.read_prompts(own)) if own else []
        look = Look(config=config, lesson=lesson, tokenizer=tokenizer, prompts=prompts, run=run)

        def evaluate(state: ServerState) -> None:
            round = state.round
            if look.is_due(round) and not saver.place.evaluated:
                show_handed_over(engine, run, state)
                with phase("evaluating"), moments_away(engine), monitor.scoring(round) as tell:
                    look.at(engine.model, round, monitor, tell)
                saver.save(replace(saver.place, evaluated=True))
            keep_record(round)

        state = run_rounds(config, engine, clients, run, saver, evaluate=evaluate, log=monitor.log)
        written = write_final(config, engine, run, state)
        if engine.layers:
            distributed.on_main(lambda: card.write(run))
        saver.save(replace(saver.place, finished=True))
        keep_record(None)
        if trackers.keep_files:  # on rank 0 alone
            with tempfile.TemporaryDirectory() as scratch:
                trackers.keep(page.write_report([run.path], Path(scratch)))
        answers = {"answers": run.path / asked.PAGE} if config.evaluation.generate else {}
        monitor.close({"run": run.path, **written, **answers})
        if "adapter" in written and not (config.task.has_head or config.model.random):
            for line in serving.next_steps(config, run, written):
                monitor.say(line)


def _facts(engine: Engine) -> dict[str, Any]:
    """Return what report.json says of the machine and the model that no other file does."""
    sizes = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in engine.model.named_parameters()
    }
    head = sum(math.prod(shape) for shape in engine.whole_shapes().values()) if engine.layers else 0
    return record.facts(
        base_parameters=sum(size for name, size in sizes.items() if ".lora_" not in name) - head,
        head_parameters=head,
        dtype=str(engine.dtype).removeprefix("torch."),
        ranks=distributed.world_size(),
        device=engine.device.type,
    )


def _tell(line: str) -> None:
    if distributed.is_main():
        print(one_line(line), flush=True)


def _intro(config: Config, engine: Engine, clients: Sequence[Examples]) -> str:
    """Return one line that says what is about to run, and on what."""
    rank, trains = config.lora.rank, engine.trains
    sizes = [
        {"A": rank * num_in, "B": num_out * rank} for num_out, num_in in engine.shapes().values()
    ]
    trained = sum(size[factor] for size in sizes for factor in trains)
    head = sum(math.prod(shape) for shape in engine.whole_shapes().values())
    where = f"in {len(engine.layers)} layers" + (f" and {head:,} in a head" if head else "")
    if not engine.layers:
        trained, where = head, "in all"
    how = Path(config.engine.deepspeed).stem if config.engine.deepspeed else "plain PyTorch"
    return (
        f"{config.method.name} on {config.model.path}: {len(clients)} clients, "
        f"{sum(map(len, clients))} examples, {trained:,} trained parameters "
        f"{where}; {str(engine.dtype).removeprefix('torch.')}, {how}, "
        f"{distributed.world_size()} x {engine.device.type}"
    )
