"""`fedex-scale client-round`: train this site's client from the server's state.

A site's run directory (run.dir/run.name) has a directory a round, named by the hash of all that the
round starts from, which is a run directory of one client: the round is resumed there when it was
killed, and handed over again without training when it was finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.load import Source
from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.data.clients import Clients
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import set_adapter, set_side
from fedex_scale.engine.models import check_packing, load_tokenizer
from fedex_scale.engine.parameters import Source as Weights
from fedex_scale.federation import checkpoint, server
from fedex_scale.federation.checkpoint import Checkpoint
from fedex_scale.federation.client import num_steps, read_update
from fedex_scale.federation.directory import check_shared, make_directory
from fedex_scale.federation.facts import ModelFacts
from fedex_scale.federation.resume import FREE, newest
from fedex_scale.federation.saves import Saver
from fedex_scale.federation.state import Place, ServerState
from fedex_scale.files.adapter_writers import AdapterWriter
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.planning import room
from fedex_scale.rounds import train
from fedex_scale.run import engine_with, load_lesson
from fedex_scale.runtime import distributed, faults, phases
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.faults import disk_errors
from fedex_scale.runtime.outputs import building, check_out, make_parents
from fedex_scale.runtime.phases import phase
from fedex_scale.runtime.progress import Monitor
from fedex_scale.runtime.trackers import Trackers
from fedex_scale.scoring.loss import held_out_loss
from fedex_scale.sites import rank
from fedex_scale.sites.base import check_state, facts_of, tell_base
from fedex_scale.sites.sent import (
    CLIENT_FILE,
    FORMAT,
    Sent,
    fetch,
    other_base,
)
from fedex_scale.sites.settings import load_site


def client_round(
    source: Source,
    overrides: Sequence[str] | Mapping[str, Any] | None,
    *,
    server_dir: Path,
    out: Path,
) -> None:
    """Train this site's client and write what it sends to `out`; every rank calls this.

    Args:
        source, overrides: the site's settings, as `load_config` takes them.
        server_dir: what the server sent.
        out: directory to make: adapter_config.json, adapter_model.safetensors, client.json.

    Raises:
        UserError: what the site can put right, on every rank, and before training where it can be
            known by then.
        ClientFailure: the loss or the adapter is not finite.
    """
    config, sent, start = load_site(source, overrides, server_dir)
    check_out(out)
    phases.start()
    with _alone_at_work(config.run.path):
        distributed.join_group(required=config.engine.deepspeed is not None)
        faults.watch_peers()
        with faults.handling_signals():
            _Round(config, sent, start).do(server_dir, out)


class _Round:
    """One round of this site's client."""

    def __init__(self, config: Config, sent: Sent, start: str) -> None:
        self._config, self._sent, self._start = config, sent, start
        self._client: int = config.site.number  # type: ignore[assignment]

    def do(self, server_dir: Path, out: Path) -> None:
        config = self._config
        with phase("load"):
            if config.train.packing:
                distributed.together(lambda: check_packing(config.model))
            tokenizer = distributed.together(lambda: load_tokenizer(config.model))
            facts = distributed.together(lambda: self._checked_facts(tokenizer))
            lesson = distributed.together(lambda: load_lesson(config, tokenizer))
            told = lesson.clients.report
            run = RunDir(config.run.path / self._name(told))
            last = distributed.on_main(lambda: self._begin(run, told, server_dir, facts))
            check_shared(run.path)
        if last is None or self._client not in last.place.done:
            self._config = config = room.settled(config, last and last.config)
            with phase("load"):
                engine = distributed.together(
                    lambda: engine_with(config, side_rank=1, kind=lesson.model)
                )
            self._train(engine, facts, lesson.clients, run, last)
        else:
            _tell(f"{run.path}: this round is finished; handing it over again")
        distributed.on_main(lambda: self._hand_over(run, out))
        distributed.on_main(lambda: _prune(config.run.path, run, config.run.keep))

    def _checked_facts(self, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
        """Return the facts of this site's model, if it is the server's."""
        facts = facts_of(self._config, side_rank=1)
        mine = tell_base(self._config.model, tokenizer, facts.layers)
        if problem := other_base(mine, facts.layers, self._sent):
            raise UserError(problem)
        return facts

    def _name(self, told: dict) -> str:
        """Return what the round's directory is called: by all that its result depends on."""
        settings = to_dict(self._config)
        for key in FREE:
            section, _, name = key.partition(".")
            settings[section].pop(name, None)
        del settings["evaluation"], settings["site"]["send"]
        text = json.dumps([self._start, settings, told["sha256"]], sort_keys=True)
        return f"round-{self._sent.round:04d}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def _begin(
        self, run: RunDir, told: dict, server_dir: Path, facts: ModelFacts
    ) -> Checkpoint | None:
        """Make the round's directory, or take it back to the checkpoint to go on from."""
        last, _, _ = newest(run)
        with disk_errors(str(run.path)):
            if last is not None:
                if last.world_size != distributed.world_size():
                    last = last.without_running()
                checkpoint.rewind(run, last)
                _tell(f"going on from checkpoint {last.number}: {last.place}")
                return last
            make_directory(self._config, run, json.dumps(told, indent=2) + "\n")
            before = run.server(self._sent.round - 1)
            parts = {"adapter": before / "adapter", "side": before / "side"}
            try:
                fetch(server_dir, self._sent, parts)
                check_state(self._sent, parts)
                if not rank.is_servers(self._config.lora, self._sent):
                    rank.cut(self._config, facts, parts, has_side=self._sent.has_side)
            except BaseException:
                shutil.rmtree(run.path, ignore_errors=True)
                raise
        return None

    def _train(
        self,
        engine: Engine,
        facts: ModelFacts,
        clients: Clients,
        run: RunDir,
        last: Checkpoint | None,
    ) -> None:
        config, number, examples = self._config, self._sent.round, clients.train[0]
        with (
            Saver(config, engine, run, last) as saver,
            Trackers(config.run.trackers, run.path) as trackers,
        ):
            distributed.on_main(lambda: trackers.open(to_dict(config)))
            steps = num_steps(len(examples), config.train)
            plan = [{}] * (number - 1) + [{self._client: steps}]
            with Monitor(run.metrics, plan=plan, trackers=trackers) as monitor:
                side = run.side(number - 1)
                state = ServerState(round=number - 1, has_side=side.is_dir())
                if saver.place is None:
                    saver.save(Place(state=state))
                if state.has_side:
                    set_side(engine, Adapter(side).pair)
                start_of = server.starts(config, facts, run, number)
                if clients.held_out and saver.place.running is None:
                    self._tell_held_out(engine, start_of, clients, monitor, side=state.has_side)
                setting = (config, engine, examples, start_of, saver, monitor.log)
                saver.attempt(self._client, partial(train, *setting), monitor.log)
                saver.settle()
        if self._client in saver.place.skipped:
            raise UserError(
                f"round {number}, client {self._client}: failed, and federation.on_client_failure "
                "is skip; nothing is sent"
            )

    def _tell_held_out(
        self,
        engine: Engine,
        start_of: Callable[[int], Weights],
        clients: Clients,
        monitor: Monitor,
        *,
        side: bool,
    ) -> None:
        """Tell the loss of the server's model, as it came, on what this site holds out."""
        set_adapter(engine, start_of(self._client), side=side)
        size = self._config.train.at_once(self._config.data.max_length)
        began = time.perf_counter()
        found = held_out_loss(engine.model, clients.held_out, micro_batch_size=size)
        seconds = time.perf_counter() - began
        monitor.log("held_out", round=self._sent.round - 1, took_s=seconds, **found)

    def _hand_over(self, run: RunDir, out: Path) -> None:
        """Copy what the client sends to where it was asked for."""
        source = run.client(self._sent.round, self._client)
        size = sum(file.stat().st_size for file in source.iterdir())
        with building(out, num_bytes=size) as scratch:
            self._write_adapter(Adapter(source), scratch)
            told = {"format": FORMAT, "start": self._start, **asdict(read_update(source))}
            (scratch / CLIENT_FILE).write_text(json.dumps(told, indent=1) + "\n")

    def _write_adapter(self, adapter: Adapter, out: Path) -> None:
        """Write an adapter as it leaves the site; where the base lies here is not told."""
        lora, dtype = self._config.lora, getattr(torch, self._config.site.send)
        shapes = {layer: adapter.shapes(layer) for layer in adapter.layers}
        with AdapterWriter(
            out,
            shapes,
            rank=lora.rank,
            alpha=lora.alpha,
            base="",
            use_rslora=lora.use_rslora,
            fan_in_fan_out=bool(adapter.config["fan_in_fan_out"]),
            dtype=dtype,
        ) as writer:
            for layer in adapter.layers:
                writer.write(layer, adapter.pair(layer))


def _prune(home: Path, newest: RunDir, keep: int) -> None:
    """Remove all but the last rounds that this site took part in."""
    rounds = [path for path in home.glob("round-*") if path != newest.path]
    rounds.sort(key=lambda path: path.stat().st_mtime)
    for path in rounds[: max(0, len(rounds) + 1 - keep)]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _alone_at_work(home: Path) -> Iterator[None]:
    """Let one round of a site run at a time: a carrier that asks twice gets the first one's result.

    Every rank waits for its own predecessor, so that none waits in a collective.
    """
    with disk_errors(str(home)):
        make_parents(home)
        file = (home / f".lock-{os.environ.get('RANK', '0')}").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _tell(f"{home}: another round of this site is at work; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(line: str) -> None:
    if distributed.is_main() and os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
