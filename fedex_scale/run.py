"""One run, from its config to its final files: prepare, train round by round, export."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from fedex_scale.aggregation.aggregator import base_update_rank, side_rank_of
from fedex_scale.config.load import Source, load_config
from fedex_scale.config.places import check_free
from fedex_scale.config.section import replace as changed
from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.data.batching import Examples
from fedex_scale.data.partition import describe, split
from fedex_scale.data.prompts import encode
from fedex_scale.data.sources import load_rows, schema_of
from fedex_scale.engine import lora_model, models
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.engine.ds_config import zero_stage
from fedex_scale.federation.checkpoint import Checkpoint, rewind
from fedex_scale.federation.client import num_steps
from fedex_scale.federation.export import show_handed_over, write_final
from fedex_scale.federation.saves import Found, Saver, find
from fedex_scale.federation.state import ServerState
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.all import METHODS
from fedex_scale.planning import choice
from fedex_scale.reporting import card, page, record, serving
from fedex_scale.rounds import choose_clients, run_rounds
from fedex_scale.runtime import distributed, faults, phases
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.faults import disk_errors
from fedex_scale.runtime.outputs import write_file
from fedex_scale.runtime.phases import phase, profiling
from fedex_scale.runtime.progress import Monitor
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.runtime.trackers import Trackers
from fedex_scale.runtime.waiting import waiting
from fedex_scale.scoring import evaluation


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
    found = distributed.on_main(lambda: check_directory(config))
    if found.checkpoint is not None and found.checkpoint.place.finished:
        more = config.federation.rounds + 1
        _tell(
            f"{run.path}: this run is finished; nothing to do (federation.rounds={more}, or more, "
            "goes on with it)"
        )
        return
    with Trackers(config.run.trackers, run.path) as trackers:
        with phase("load"), waiting("reading the data and loading the model"):
            distributed.together(lambda: check_evaluation(config))
            if config.train.packing:
                distributed.together(lambda: models.check_packing(config.model))
            tokenizer = distributed.together(lambda: models.load_tokenizer(config.model))
            clients, partition = distributed.together(lambda: load_clients(config, tokenizer))
            config = with_side_rank(config, found)
            warning = distributed.on_main(lambda: choice.warning(config))
            if warning:
                _tell(warning)
            distributed.on_main(lambda: trackers.open(to_dict(config)))
            engine = distributed.together(lambda: engine_for(config, len(clients)))
            distributed.on_main(lambda: prepare_directory(config, run, partition, found.checkpoint))
        for note in found.notes:
            _tell(note)
        _run(config, engine, tokenizer, clients, run, found.checkpoint, trackers)


def with_side_rank(config: Config, found: Found) -> Config:
    """Return the config with the side adapter's columns that a run was begun with, or may have."""
    if config.aggregate.side_rank != "auto":
        return config
    if found.checkpoint is not None:
        rank = found.checkpoint.config["aggregate"]["side_rank"]
    else:
        rank = distributed.on_main(lambda: choice.side_rank_that_fits(config))
        if rank != "auto":
            _tell(f"side adapter: room for {rank} columns here (aggregate.side_rank)")
    return changed(config, aggregate=changed(config.aggregate, side_rank=rank))


def check_evaluation(config: Config) -> None:
    """Raise a UserError where the model could be trained but not scored."""
    partitioned = zero_stage(config.engine) == 3
    evaluation.check_batch_size(config.evaluation, partitioned=partitioned)
    evaluation.check_tasks(config.evaluation)


def load_clients(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Examples], dict]:
    """Return each client's examples, and what partition.json says of them."""
    seed = config.run.seed
    rows = load_rows(config.data, derive_seed(seed, "rows"))
    examples = encode(rows, schema_of(config.data), tokenizer, max_length=config.data.max_length)
    models.check_vocabulary(config.model, int(examples.tokens.max(initial=0)))
    rows = rows.select(examples.rows)
    parts = split(rows, config.partition, derive_seed(seed, "partition"))
    report = describe(parts, rows, config.partition.column)
    report |= {"truncated": examples.num_truncated, "dropped": examples.num_dropped}
    report["sha256"] = digest_of(examples)
    if METHODS[config.method.name].one_client:
        parts = [sorted(index for part in parts for index in part)]
    return [examples.select(part) for part in parts], report


def engine_for(config: Config, num_clients: int) -> Engine:
    """Build the run's engine."""
    train = config.train
    per_forward = train.micro_batch_size * distributed.world_size()
    chosen = len(choose_clients(config.federation, num_clients, config.run.seed, 1))
    side_rank = side_rank_of(
        config.method, config.aggregate, chosen, config.lora.rank, config.federation.rounds
    )
    adds = base_update_rank(config.method, chosen, config.lora.rank) > 0
    engine = build_engine(
        config.model,
        config.lora,
        config.engine,
        trains=METHODS[config.method.name].trains,
        side_rank=side_rank,
        has_planes=adds and config.aggregate.fold == "planes",
        optimizer=train.optimizer,
        micro_batch_size=train.micro_batch_size,
        accumulation=max(1, -(-train.batch_size // per_forward)),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    tied = lora_model.tied_layers(engine.model)
    if tied and adds and config.aggregate.fold != "side":
        raise UserError(
            f"lora.target_modules: layer {tied[0]}: its weight is the embedding's too, which what "
            f"{config.method.name} adds to the base would change; leave {tied[0]} out, or use "
            "aggregate.fold=side, which leaves the base as it is"
        )
    return engine


def digest_of(examples: Examples) -> str:
    """Return the SHA-256 of the tokens: other data, or another tokenizer, is another run."""
    digest = hashlib.sha256()
    for array in (examples.tokens, examples.lengths, examples.prompt_lengths):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_directory(config: Config) -> Found:
    """Return where to go on from, if the run is to resume one that is there.

    Raises:
        UserError: the run directory is in use, cannot be gone on from, or cannot be written.
    """
    path = config.run.path
    if path.exists() and config.run.resume == "auto":
        return find(config, RunDir(path))
    check_free(config.run)
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write to {parent} ({error.strerror}); choose another run.dir"
        ) from None
    return Found(None, ())


def prepare_directory(
    config: Config, run: RunDir, partition: dict, last: Checkpoint | None
) -> None:
    """Make the run directory, or take it back to the checkpoint to go on from."""
    with disk_errors(str(run.path)):
        text = json.dumps(partition, indent=2) + "\n"
        if last is None:
            make_directory(config, run, text)
        elif (run.path / "partition.json").read_text() != text:
            raise UserError(
                f"resume: {run.path}: the data are others than those it was begun with; bring "
                "them back, or choose another run.name"
            )
        else:
            rewind(run, last)
            own = to_dict(config)
            own["run"] |= {key: last.config["run"][key] for key in ("resume", "overwrite")}
            write_file(run.path / "config.yaml", yaml.safe_dump(own, sort_keys=False))


def make_directory(config: Config, run: RunDir, partition: str) -> None:
    """Make the run directory, with what was decided before the first step, at one stroke."""
    new, old = (run.path.with_name(f".{run.path.name}.{word}") for word in ("new", "old"))
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir(parents=True)
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    (new / "config.yaml").write_text(text, encoding="utf-8")
    (new / "partition.json").write_text(partition)
    if run.path.exists():
        run.path.rename(old)
    new.rename(run.path)
    shutil.rmtree(old, ignore_errors=True)


def _run(
    config: Config,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    clients: list[Examples],
    run: RunDir,
    last: Checkpoint | None,
    trackers: Trackers,
) -> None:
    rounds, seed = config.federation.rounds, config.run.seed
    plan = [
        {client: num_steps(len(clients[client]), config.train) for client in chosen}
        for chosen in (
            choose_clients(config.federation, len(clients), seed, round)
            for round in range(1, rounds + 1)
        )
    ]
    with (
        Saver(config, engine, run, last) as saver,
        Monitor(run.metrics, plan=plan, trackers=trackers) as monitor,
    ):
        monitor.say(_intro(config, engine, clients))

        known = _facts(engine)

        def keep_record(round: int | None) -> None:
            monitor.log("phases", round=round, **phases.lap())
            with phase("writing"):
                distributed.on_main(lambda: record.write(run, known))

        def evaluate(state: ServerState) -> None:
            round = state.round
            if config.evaluation.due(round, rounds) and not saver.place.evaluated:
                began = time.perf_counter()
                show_handed_over(engine, run, state)
                with phase("evaluating"), monitor.scoring(round) as tell:
                    results = evaluation.evaluate(engine.model, tokenizer, config.evaluation, tell)
                    evaluation.write_results(results, run.evaluation(round))
                seconds = time.perf_counter() - began
                monitor.log("eval", round=round, took_s=seconds, **evaluation.scores(results))
                for warning in evaluation.warnings(results):
                    monitor.say(f"warning: {warning}")
                saver.save(replace(saver.place, evaluated=True))
            keep_record(round)

        pad_id = tokenizer.pad_token_id
        state = run_rounds(
            config, engine, clients, run, saver, pad_id=pad_id, evaluate=evaluate, log=monitor.log
        )
        written = write_final(config, engine, run, state)
        distributed.on_main(lambda: card.write(run))
        saver.save(replace(saver.place, finished=True))
        keep_record(None)
        if trackers.keep_files:  # on rank 0 alone
            with tempfile.TemporaryDirectory() as scratch:
                trackers.keep(page.write_report([run.path], Path(scratch)))
        monitor.close({"run": run.path, **written})
        if distributed.is_main() and not config.model.random:
            for line in serving.next_steps(config, run, written):
                monitor.say(line)


def _facts(engine: Engine) -> dict[str, Any]:
    """Return what report.json says of the machine and the model that no other file does."""
    sizes = {
        name: getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in engine.model.named_parameters()
    }
    return record.facts(
        base_parameters=sum(size for name, size in sizes.items() if ".lora_" not in name),
        dtype=str(engine.dtype).removeprefix("torch."),
        ranks=distributed.world_size(),
        device=engine.device.type,
    )


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _intro(config: Config, engine: Engine, clients: list[Examples]) -> str:
    """Return one line that says what is about to run, and on what."""
    rank, trains = config.lora.rank, engine.trains
    sizes = [
        {"A": rank * num_in, "B": num_out * rank} for num_out, num_in in engine.shapes().values()
    ]
    trained = sum(size[factor] for size in sizes for factor in trains)
    how = Path(config.engine.deepspeed).stem if config.engine.deepspeed else "plain PyTorch"
    return (
        f"{config.method.name} on {config.model.path}: {len(clients)} clients, "
        f"{sum(map(len, clients))} examples, {trained:,} trained parameters in "
        f"{len(engine.layers)} layers; {str(engine.dtype).removeprefix('torch.')}, {how}, "
        f"{distributed.world_size()} x {engine.device.type}"
    )
