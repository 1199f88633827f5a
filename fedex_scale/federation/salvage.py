"""What of a checkpoint still stands where files that it lists are damaged or gone.

A power cut may empty any file that was written last. Most of a run can be made again, to the same
bits: a client is trained again, a score taken again, the final files written again. So a checkpoint
is taken back to before what is lost, and only where that cannot be is another one looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_scale.federation.checkpoint import Checkpoint
from fedex_scale.federation.state import Place
from fedex_scale.files.run_dir import DEVIATION_FILE, RunDir
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

_CLIENT = re.compile(r"clients/round-(\d+)/client-(\d+)/")
_FIGURES = re.compile(rf"server/round-\d+/{re.escape(DEVIATION_FILE)}")
_SCORE = re.compile(r"evaluations/round-(\d+)/")


def salvaged(
    run: RunDir, checkpoint: Checkpoint, damaged: Mapping[str, str]
) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint, or an earlier place of its run, that needs no damaged file.

    Args:
        damaged: what is wrong with a file, by its name in the run.

    Returns:
        The checkpoint, and lines on what was left behind.

    Raises:
        UserError: a file is needed and cannot be made again.
    """
    notes = []
    for name, problem in sorted(damaged.items()):
        place, client, score = checkpoint.place, _CLIENT.match(name), _SCORE.match(name)
        if name == "partition.json":
            continue  # made again from the data, and compared with what is listed
        if name.startswith("final/"):
            checkpoint = replace(checkpoint, place=replace(place, finished=False))
            notes.append(f"{problem}; the final files are written again")
        elif name.startswith(f"checkpoints/{checkpoint.number:06d}/"):
            if place.running is not None:  # else another of its files was damaged, too
                notes.append(f"{problem}; client {place.running.client} starts over")
            checkpoint = checkpoint.without_running()
        elif score and int(score[1]) == place.state.round and place.evaluated:
            checkpoint = _back(run, checkpoint, "eval", place.state.round, None)
            place = replace(place, evaluated=False, done=(), skipped=(), running=None)
            checkpoint = replace(checkpoint, place=replace(place, finished=False))
            notes.append(f"{problem}; round {place.state.round} is scored again")
        elif client and int(client[1]) == place.state.round + 1 and int(client[2]) in place.done:
            first = int(client[2])
            checkpoint = _back(run, checkpoint, "step", place.state.round + 1, first)
            done = place.done[: place.done.index(first)]
            skipped = tuple(x for x in place.skipped if x < first)
            place = replace(place, done=done, skipped=skipped, running=None)
            checkpoint = replace(checkpoint, place=place)
            notes.append(f"{problem}; client {first} is trained again")
        elif client and int(client[1]) == place.state.round + 1:
            continue  # after one that is trained again
        elif (client or score or _FIGURES.fullmatch(name)) and not (
            client and place.state.base_changed
        ):
            notes.append(f"{problem}; the run goes on without it, which it does not need")
            checkpoint = replace(checkpoint, without=(*checkpoint.without, name))
        else:
            raise UserError(problem)
    files = {
        name: entry
        for name, entry in checkpoint.files.items()
        if name == "partition.json"
        or (name not in damaged and _still_holds(name, checkpoint.place))
    }
    return replace(checkpoint, files=files), notes


def _still_holds(name: str, place: Place) -> bool:
    """Return whether a file that was listed is one of this place, which may be an earlier one."""
    client, score = _CLIENT.match(name), _SCORE.match(name)
    if client and int(client[1]) == place.state.round + 1:
        return int(client[2]) in place.done
    if score and int(score[1]) == place.state.round:
        return place.evaluated
    return place.finished or not name.startswith("final/")


def _back(
    run: RunDir, checkpoint: Checkpoint, event: str, round: int, client: int | None
) -> Checkpoint:
    """Return the checkpoint with metrics.jsonl cut off before something was first told."""
    length = 0
    for line in _lines(run.metrics, checkpoint.metrics_bytes):
        tree: Any = door.parse_json(line, finite=False)
        first = (tree.get("event"), tree.get("round")) == (event, round)
        if first and client in (None, tree.get("client")):
            return replace(checkpoint, metrics_bytes=length, boundary_bytes=length)
        length += len(line) + 1
    return checkpoint


def _lines(path: Path, length: int) -> Iterable[bytes]:
    for line in door.read_lines(path, inside=path.parent):
        if length <= 0:
            return
        length -= len(line) + 1
        yield line
