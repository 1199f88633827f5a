"""`fedex-scale server-round`: take what arrived, aggregate, and write what every site is sent next.

    RUN/sent/round-0003/        what every site is sent for round 3; the round is open while there
                                is no later one, and no final/
    RUN/arrived/round-0003/X/   what a carrier puts there, a directory a site

The rest of RUN is a run's directory, as a simulation leaves it. What is sent next is given its name
last, at one stroke: a round that was interrupted before is done again, to the same bits.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedex_scale.aggregation.ranks import side_rank_of
from fedex_scale.config.load import Source
from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.config.words import shown
from fedex_scale.engine.models import load_tokenizer
from fedex_scale.federation import server
from fedex_scale.federation.directory import make_directory
from fedex_scale.federation.facts import ModelFacts, no_weights
from fedex_scale.federation.final import write_adapters
from fedex_scale.federation.history import History
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapter_writers import PartWriter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import LowRank
from fedex_scale.rounds import client_weights
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.faults import disk_errors
from fedex_scale.runtime.outputs import lock, sync, sync_tree, write_file
from fedex_scale.sites.arrived import Taken, take
from fedex_scale.sites.base import facts_of, tell_base
from fedex_scale.sites.sent import Sent, read_sent, write_sent
from fedex_scale.sites.settings import load_federation

KNOWN = "rounds clients method init rank alpha use_rslora layers base".split()
"""What server.json says in every round."""


def server_round(
    directory: Path,
    source: Source | None = None,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Begin a federation, or aggregate what arrived for its open round.

    Args:
        directory: the run's directory, which is made where there is none.
        source, overrides: the federation's settings, to begin with; `data` may be left out. Of one
            that was begun nothing is aggregated then.
        say: takes a line for the user.

    Raises:
        UserError: settings that cannot work over sites; a round for which too few results arrived.
            Nothing is changed then.
    """
    run = RunDir(directory)
    if not directory.exists():
        if source is None:
            raise UserError(f"{directory}: no such run; --config FILE begins one")
        _begin(run, load_federation(source, overrides), say)
        return
    config = load_federation(directory / "config.yaml", ())
    if source is not None and to_dict(load_federation(source, overrides)) != to_dict(config):
        raise UserError(
            f"{directory}: was begun with other settings; leave --config out, or choose another RUN"
        )
    if source is None and overrides:
        raise UserError(
            f"{directory}: settings are for a federation's beginning, with --config; leave out "
            f"{shown(', '.join(map(str, overrides)))}"
        )
    with _alone_at_work(directory), disk_errors(str(directory)):
        sent = open_round(run)
        _tell_late(run, sent, say)
        if sent is None:
            say(f"{directory}: this federation is finished; nothing to do")
        elif source is not None:
            say(f"round {sent.round} is open; send {_sent_path(run, sent.round)}")
        else:
            arrived = run.path / "arrived" / f"round-{sent.round:04d}"
            _aggregate(config, run, sent, arrived, say)


def _tell_late(run: RunDir, sent: Sent | None, say: Callable[[str], None]) -> None:
    """Tell of results that arrived for a round that is not open."""
    awaited = None if sent is None else f"round-{sent.round:04d}"
    for folder in sorted(run.path.glob("arrived/round-*")):
        late = sorted(x.name for x in folder.iterdir() if not x.name.startswith("."))
        if folder.name != awaited and late:
            names = shown(", ".join(late))
            say(f"{folder}: this round is not open, what arrived is left out ({names}); delete it")


def open_round(run: RunDir) -> Sent | None:
    """Return what the sites were sent for the round that is open; None where all are done."""
    if (run.final / "adapter").is_dir():
        return None
    paths = sorted(run.path.glob("sent/round-*"))
    if not paths:
        raise UserError(f"{run.path}: expected a federation's run, found nothing sent to sites")
    return read_sent(paths[-1])[0]


def _facts(config: Config) -> ModelFacts:
    clients, rounds = config.partition.num_clients, config.federation.rounds
    rank = side_rank_of(config.method, config.aggregate, clients, config.lora.rank, rounds)
    return facts_of(config, side_rank=rank)


def _begin(run: RunDir, config: Config, say: Callable[[str], None]) -> None:
    """Make a run's directory whose first round is open."""
    facts = _facts(config)
    fields = _known(config, facts)
    scratch = RunDir(run.path.with_name(f".{run.path.name}.begun"))
    with disk_errors(str(run.path)):
        shutil.rmtree(scratch.path, ignore_errors=True)
        try:
            nobody = [{"num_examples": 0}] * config.partition.num_clients
            make_directory(config, scratch, json.dumps({"clients": nobody}) + "\n")
            server.draw_adapter(config, facts, scratch)
            _send(scratch, facts, ServerState(), fields)
            _publish(scratch.path, run.path)
        except BaseException:
            shutil.rmtree(scratch.path, ignore_errors=True)
            raise
    say(f"round 1 is open; send {_sent_path(run, 1)}")


def _known(config: Config, facts: ModelFacts) -> dict[str, Any]:
    """Return what server.json says in every round."""
    return {
        "rounds": config.federation.rounds,
        "clients": config.partition.num_clients,
        "method": config.method.name,
        "init": config.federation.init,
        "rank": config.lora.rank,
        "alpha": float(config.lora.alpha),
        "use_rslora": config.lora.use_rslora,
        "layers": facts.layers,
        "base": tell_base(config.model, load_tokenizer(config.model), facts.layers),
    }


def _send(run: RunDir, facts: ModelFacts, state: ServerState, fields: Mapping[str, Any]) -> None:
    """Write what every site is sent for the round after `state`, and give it its name."""
    final = _sent_path(run, state.round + 1)
    scratch = final.with_name(f".{final.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shutil.copytree(run.adapter(state.round), scratch / "adapter")
    if state.has_side:
        history = History(run, state.round)
        most = max(history.side_rank(layer) for layer in facts.layers)
        with PartWriter(
            scratch / "side", facts.layers, max_rank=most, dtype=facts.dtype, base=""
        ) as writer:
            for layer in facts.layers:
                pair = history.side(layer)
                writer.write(layer, LowRank(pair.B_OR, pair.A_RI))
    write_sent(scratch, {"round": state.round + 1, "has_side": state.has_side, **fields})
    _publish(scratch, final)


def _publish(scratch: Path, final: Path) -> None:
    """Give a directory its name, once what it holds is on disk."""
    sync_tree(scratch)
    scratch.rename(final)
    sync(final.parent)


def _aggregate(
    config: Config, run: RunDir, sent: Sent, arrived: Path, say: Callable[[str], None]
) -> None:
    """Aggregate what arrived for a round, and open the next or write what is handed over."""
    began, facts = time.perf_counter(), _facts(config)
    taken = take(config, facts, run, sent, arrived, say)
    try:
        weights = client_weights(config.federation, taken.updates)
    except UserError:
        for name in taken.refused:  # so that the site is asked again
            aside = arrived / f".refused-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            (arrived / name).rename(aside)
        raise
    clients = [update.client for update in taken.updates]
    shutil.rmtree(run.server(sent.round), ignore_errors=True)
    state = ServerState(round=sent.round - 1, has_side=sent.has_side)
    absent = [k for k in range(sent.clients) if k not in clients]
    state, report = server.aggregate_round(
        config, facts, no_weights(facts), clients, weights, run, state, skipped=absent
    )
    for update in taken.updates:
        folder = run.client(sent.round, update.client)
        (folder / "client.json").write_text(json.dumps(asdict(update), indent=2) + "\n")
    _tell_examples(run, taken)
    summary = report.summary(config.aggregate)
    _log(run, sent.round, _events(sent.round, taken, summary), began)
    for folder in (run.server(sent.round), run.client(sent.round, 0).parent):
        sync_tree(folder)  # before the next round is open, and what arrived is deleted
        sync(folder.parent)
    sync(run.path)
    say(f"round {sent.round} aggregated: {len(clients)} of {sent.clients} sites, {_kept(summary)}")
    for note in summary["notes"]:
        say(f"note: {note}")
    if state.round < config.federation.rounds:
        _send(run, facts, state, {name: getattr(sent, name) for name in KNOWN})
        say(f"round {state.round + 1} is open; send {_sent_path(run, state.round + 1)}")
    else:
        _finish(config, facts, run, state)
        say(f"finished: {run.final}")
    shutil.rmtree(arrived, ignore_errors=True)


def _tell_examples(run: RunDir, taken: Taken) -> None:
    """Keep in partition.json what is known of the sites' data: how many examples they told of."""
    path = run.path / "partition.json"
    known = door.read_json(path, "restore the files of this run")["clients"]
    for update in taken.updates:
        known[update.client] = {"num_examples": update.num_examples}
    write_file(path, json.dumps({"clients": known}, indent=2) + "\n")


def _finish(config: Config, facts: ModelFacts, run: RunDir, state: ServerState) -> None:
    """Write what the federation hands over, at one stroke."""
    scratch = run.path / ".final"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    write_adapters(config, facts, run, state, scratch)
    _publish(scratch, run.final)


def _events(number: int, taken: Taken, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a round's lines of metrics.jsonl, as a simulation writes them."""
    failed = {"event": "failure", "round": number, "client": None, "action": "skip"}
    return [
        *({"event": "client", **asdict(update)} for update in taken.updates),
        *({**failed, "reason": reason} for reason in taken.refused.values()),
        {"event": "round", "round": number, **summary},
    ]


def _log(run: RunDir, number: int, events: list[dict[str, Any]], began: float) -> None:
    """Add a round's lines to metrics.jsonl, in place of those of an attempt that did not end."""
    lines = door.read_lines(run.metrics) if run.metrics.exists() else ()
    before = [line.decode() for line in lines if door.parse_json(line)["round"] < number]
    last = door.parse_json(before[-1])["seconds"] if before else 0.0
    seconds = round(last + time.perf_counter() - began, 3)
    new = [json.dumps({"seconds": seconds, **event}) for event in events]
    write_file(run.metrics, "\n".join([*before, *new]) + "\n")


def _kept(summary: Mapping[str, Any]) -> str:
    if not summary["residual_norm"]:
        return "nothing to add to the base"
    return f"kept {summary['kept']:.4%} of its residual"


def _sent_path(run: RunDir, number: int) -> Path:
    return run.path / "sent" / f"round-{number:04d}"


@contextmanager
def _alone_at_work(directory: Path) -> Iterator[None]:
    file = directory / ".lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(file, str(directory)))
        except OSError as error:
            raise UserError(f"{file}: cannot be a lock ({error.strerror}); delete it") from None
        yield
