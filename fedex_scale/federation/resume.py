"""Where an interrupted run goes on, and which settings may have changed meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.federation import checkpoint
from fedex_scale.federation.checkpoint import Checkpoint
from fedex_scale.federation.client import CLIENT_FILE
from fedex_scale.federation.salvage import salvaged
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError

# What may change between a run and its resumption: nothing in the result depends on it ...
FREE = frozenset(
    "run.name run.dir run.overwrite run.resume run.keep run.save_steps run.trackers "
    "run.profile_steps data.max_dropped "
    "federation.on_client_failure evaluation.batch_size".split()
)


# ... or how long the run is ...
ROUNDS = "federation.rounds"


# ... or rounding alone does; a running client then starts over.
ROUNDING = frozenset(
    "train.micro_batch_size train.micro_batch_tokens train.packing model.gradient_checkpointing "
    "engine.deepspeed engine.nvme_path".split()
)


AUTO = (("aggregate", "side_rank"), ("train", "micro_batch_tokens"))
"""Which settings may say auto, for what the machine that begins a run has room for."""


@dataclass(frozen=True)
class Found:
    """Where a run goes on, and what to tell the user of it."""

    checkpoint: Checkpoint | None
    notes: tuple[str, ...]


def find(config: Config, run: RunDir) -> Found:
    """Return the place to go on from in an existing run directory; none: start anew.

    Raises:
        UserError: nothing there can be gone on from, or the config is another one.
    """
    found, problems, notes = newest(run)
    notes = [*(f"{problem}; taking the checkpoint before it" for problem in problems), *notes]
    if found is None:
        untouched = not problems and not (run.path / "clients").exists()
        is_run = (run.path / "config.yaml").is_file()
        if config.run.overwrite or (untouched and is_run):
            return Found(None, (f"{run.path}: no checkpoint to go on from; starting anew",))
        raise UserError(
            f"{problems[0] if problems else run.path}: no checkpoint to go on from; choose another "
            "run.name, or run.overwrite=true to start anew"
        )
    own = to_dict(config)
    for section, key in AUTO:
        if own[section][key] == "auto":
            own[section][key] = found.config.get(section, {}).get(key)
    changed = differences(found.config, own) - FREE
    fixed = changed - ROUNDING - {ROUNDS}
    if fixed:
        raise UserError(
            f"resume: {run.path} was run with other settings: {', '.join(sorted(fixed))}; set "
            "them back, or choose another run.name (what may change: "
            f"{', '.join(sorted({ROUNDS} | ROUNDING | FREE))})"
        )
    if ROUNDS in changed:
        changed.remove(ROUNDS)
        found, note = _of_other_length(config, run, found)
        notes.append(note)
    size = distributed.world_size()
    if size != found.world_size:
        changed |= {f"{found.world_size} ranks, now {size}"}
    if changed:
        notes.append(f"changed: {', '.join(sorted(changed))}; results may differ by rounding")
        if found.place.running is not None:
            notes.append(f"client {found.place.running.client} starts over")
        found = found.without_running()
    notes.append(f"going on from checkpoint {found.number}: {found.place}")
    return Found(found, tuple(notes))


def newest(run: RunDir) -> tuple[Checkpoint | None, list[str], list[str]]:
    """Return the newest place that stands, why none of newer checkpoints, and what it leaves."""
    problems = []
    for number in reversed(checkpoint.numbers(run)):
        try:
            found = checkpoint.read(run, number)
            place, notes = salvaged(run, found, checkpoint.damaged(run, found, deep=True))
            return place, problems, notes
        except UserError as error:
            problems.append(str(error))
    return None, problems, []


def check_place(run: RunDir, last: Checkpoint | None, plan: Sequence[Iterable[int]]) -> None:
    """Raise a UserError where a checkpoint tells of clients that are not those of its round.

    Args:
        plan: the clients of each round.
    """
    if last is None:
        return
    place = last.place
    named = {*place.done, *place.skipped} | ({place.running.client} if place.running else set())
    there = set(plan[place.state.round]) if place.state.round < len(plan) else set()
    there -= {
        client
        for client in place.done
        if _name(run, run.client(place.state.round + 1, client)) not in last.files
    }
    if strangers := named - there:
        raise UserError(
            f"{run.checkpoint(last.number)}: damaged: it tells of client {min(strangers)} in round "
            f"{place.state.round + 1}, who is not there; delete it to go on from the one before"
        )


def _name(run: RunDir, client: Path) -> str:
    return str((client / CLIENT_FILE).relative_to(run.path))


def _of_other_length(config: Config, run: RunDir, found: Checkpoint) -> tuple[Checkpoint, str]:
    """Return the place to go on from to another number of rounds, and what to tell of it.

    Nothing in a round depends on how many follow, so that the result is that of a run which was
    to have this many from its beginning.

    Raises:
        UserError: more rounds are begun already.
    """
    rounds, place = config.federation.rounds, found.place
    planned = found.config["federation"]["rounds"]
    begun = place.state.round + bool(place.done or place.skipped or place.running)
    if rounds < begun:
        raise UserError(
            f"{ROUNDS}: expected at least {begun}, as {run.path} has begun as many, got {rounds}; "
            f"the run is to have {planned}"
        )
    if place.finished:
        found = replace(found, place=replace(place, finished=False))
    again = "; final/ is made anew" * place.finished
    return found, f"{ROUNDS}: {planned}, now {rounds}{again}"


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the keys, as section.key, whose values differ."""
    changed = set()
    for key in old.keys() | new.keys():
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict) and not prefix:
            changed |= differences(one, other, f"{key}.")
        elif one != other:
            changed.add(prefix + key)
    return changed
