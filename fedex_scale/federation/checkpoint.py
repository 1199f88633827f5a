"""Checkpoints on disk: written beside and renamed, verified before one is believed.

A run's large files are in its directory anyway: the adapter of every client and of the server
after every round. A checkpoint says which of them are complete, by size and SHA-256, and how far
the run had come; for a client that is being trained it holds that client's adapter, optimizer
moments and random states as well. What a fold did to the base is not stored a second time: a
resumed run folds the same adapters again.

    checkpoints/000007/manifest.json             place, config, every file it relies on
    checkpoints/000007/adapter/                  the running client's, a PEFT directory
    checkpoints/000007/rank-0000.safetensors     a rank's optimizer moments and random states
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedex_scale.config.words import shown
from fedex_scale.federation.state import Place
from fedex_scale.files import checked, kinds
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import sync

FORMAT = 3
MANIFEST = "manifest.json"
_BLOCK = 2**20
_KEPT = ("clients/", "evaluations/")  # files of rounds that are over do not change


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint's manifest.

    Fields:
        config: the resolved config, as plain data.
        world_size: ranks that wrote it.
        metrics_bytes: length of metrics.jsonl at this place.
        metrics_sha256: of so much of it.
        boundary_bytes: its length where the running client had not begun.
        base: size and SHA-256 of the base model's files, by name (none of random weights), and of
            those that are scored on.
        files: size and SHA-256 of every file that it relies on, by path in the run directory.
        without: damaged files that it is gone on without; not in the manifest.
    """

    number: int
    place: Place
    config: dict[str, Any]
    world_size: int
    metrics_bytes: int
    boundary_bytes: int
    metrics_sha256: str = ""
    base: dict[str, tuple[int, str]] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def without_running(self) -> Checkpoint:
        """Return the same where the running client has not begun."""
        place = replace(self.place, running=None)
        return replace(self, place=place, metrics_bytes=self.boundary_bytes)


def publish(run: RunDir, scratch: Path, checkpoint: Checkpoint, known: dict) -> Checkpoint:
    """Complete a checkpoint that was begun in `scratch`, and give it its name.

    Args:
        known: entries of files that an earlier checkpoint relies on, which are not read again.

    Returns:
        The checkpoint with all its files. They are on disk, and so is its name.
    """
    own = {path: path.relative_to(scratch) for path in _files_under([scratch])}
    final = run.checkpoint(checkpoint.number)
    files = {name: entry for name, entry in known.items() if name.startswith(_KEPT)}
    tops = [top for top in folders_of(run, checkpoint.place) if top.exists()]
    for above in {x for top in tops for x in top.parents if x.is_relative_to(run.path)}:
        sync(above)
    for path in _files_under(tops):
        name = str(path.relative_to(run.path))
        files[name] = known.get(name) or entry_of(path)
    for path, name in own.items():
        files[str((final / name).relative_to(run.path))] = entry_of(path)
    length = checkpoint.metrics_bytes
    digest = digest_of(run.metrics, length) if length else ""
    complete = replace(checkpoint, files=files, metrics_sha256=digest)
    _write_manifest(scratch / MANIFEST, complete)
    if final.exists():
        shutil.rmtree(final)
    scratch.rename(final)
    sync(run.checkpoints)
    return complete


def prune(run: RunDir, newest: Checkpoint, *, keep: int) -> None:
    """Remove all but the newest `keep`, once the newest has been read back."""
    problems = damaged(run, read(run, newest.number), deep=False)
    if problems:
        raise UserError(next(iter(problems.values())))
    for number in numbers(run)[:-keep]:
        shutil.rmtree(run.checkpoint(number))


def numbers(run: RunDir) -> list[int]:
    """Return the numbers of the checkpoints there are, ascending."""
    if not run.checkpoints.is_dir():
        return []
    names = (path.name for path in run.checkpoints.iterdir() if _is_own(path))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read(run: RunDir, number: int) -> Checkpoint:
    """Return a checkpoint's manifest.

    Raises:
        UserError: it is damaged; the message names the file.
    """
    path = run.checkpoint(number) / MANIFEST
    try:
        return _read_manifest(path, number)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def damaged(run: RunDir, checkpoint: Checkpoint, *, deep: bool) -> dict[str, str]:
    """Return what is wrong with the files that a checkpoint lists, by their names.

    Args:
        deep: read the files, and compare their SHA-256 as well.
    """
    found = {}
    for name, (size, digest) in checkpoint.files.items():
        file = run.path / name
        try:
            with door.opened(file, inside=run.path) as opened:
                there = os.fstat(opened.fileno()).st_size
            if there != size:
                found[name] = f"{file}: damaged: expected {size} bytes, got {there}"
            elif deep and entry_of(file)[1] != digest:
                found[name] = f"{file}: damaged: its SHA-256 is another one"
        except OSError as error:
            found[name] = f"{file}: damaged: {error.strerror}"
        except UserError as error:
            found[name] = f"{file}: damaged: {error}"
    length = checkpoint.metrics_bytes
    if deep and length and digest_of(run.metrics, length) != checkpoint.metrics_sha256:
        found["metrics.jsonl"] = f"{run.metrics}: damaged: its first {length:,} bytes are others"
    return found


def digest_of(path: Path, length: int) -> str:
    """Return the SHA-256 of a file's beginning; of nothing, where it is not there."""
    digest = hashlib.sha256()
    try:
        with door.opened(path, inside=path.parent) as file:
            while length > 0 and (block := file.read(min(length, _BLOCK))):
                digest.update(block)
                length -= len(block)
    except OSError:
        pass
    return digest.hexdigest() if length == 0 else ""


def rewind(run: RunDir, checkpoint: Checkpoint) -> None:
    """Take the run directory back to a checkpoint: remove what came after it."""
    place = checkpoint.place
    for number in numbers(run):
        if number > checkpoint.number:
            shutil.rmtree(run.checkpoint(number))
    for scratch in run.checkpoints.glob(".*"):
        if _is_own(scratch):
            shutil.rmtree(scratch)
    after = [run.final]
    after += [x for x in run.server(0).parent.glob("round-*") if x > run.server(place.state.round)]
    running = run.client(place.state.round + 1, 0).parent
    after += [x for x in running.parent.glob("round-*") if x > running]
    last = place.state.round if place.evaluated else place.state.round - 1
    scored = run.evaluation(0).parent.glob("round-*")
    after += [x for x in scored if x > run.evaluation(max(last, 0)) or last < 0]
    done = [run.client(place.state.round + 1, client) for client in place.done]
    after += [x for x in running.glob("*") if x not in done]
    for folder in after:
        shutil.rmtree(folder, ignore_errors=True)
    for name in checkpoint.without:
        (run.path / name).unlink(missing_ok=True)
    if run.metrics.exists() and run.metrics.stat().st_size > checkpoint.metrics_bytes:
        os.truncate(run.metrics, checkpoint.metrics_bytes)


def folders_of(run: RunDir, place: Place) -> list[Path]:
    """Return what in the run directory a run at this place relies on.

    Adapters of clients whose round is over count only where the base must be folded again.
    """
    rounds = range(1, place.state.round + 1)
    folders = [run.server(round) for round in (0, *rounds)]
    if place.state.base_changed:
        folders += [run.client(round, 0).parent for round in rounds]
    folders += [run.client(place.state.round + 1, client) for client in place.done]
    folders += [run.evaluation(place.state.round)] * place.evaluated
    folders += [run.final] * place.finished
    return [run.path / "partition.json", *folders]


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def entry_of(path: Path) -> tuple[int, str]:
    """Return a file's size and SHA-256, once it is on disk."""
    sync(path)
    return door.digest(path, inside=path.parent)


def _files_under(folders: Iterable[Path]) -> list[Path]:
    """Return all files below, after the names in their directories have reached the disk."""
    files = []
    for top in folders:
        if top.is_file():
            files.append(top)
        for folder, _, names in os.walk(top):
            sync(Path(folder))
            files += [Path(folder) / name for name in names]
    return sorted(files)


def _write_manifest(path: Path, checkpoint: Checkpoint) -> None:
    tree = {
        "format": FORMAT,
        "number": checkpoint.number,
        "place": checkpoint.place.as_dict(),
        "world_size": checkpoint.world_size,
        "metrics_bytes": checkpoint.metrics_bytes,
        "metrics_sha256": checkpoint.metrics_sha256,
        "boundary_bytes": checkpoint.boundary_bytes,
        "base": checkpoint.base,
        "config": checkpoint.config,
        "config_sha256": _digest(checkpoint.config),
        "files": checkpoint.files,
    }
    tree["sha256"] = _digest(tree)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    sync(path)
    sync(path.parent)


def _read_manifest(path: Path, number: int) -> Checkpoint:
    tree = door.parse_json(door.read_bytes(path, inside=path.parent))
    if not isinstance(tree, dict) or tree.pop("sha256", None) != _digest(tree):
        raise ValueError("its SHA-256 is another one")
    if tree.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {shown(tree.get('format'))}")
    found = checked.check(kinds.Manifest, tree | {"sha256": ""}, path, "take another checkpoint")
    if found.number not in (None, number):
        raise ValueError(f"it is that of checkpoint {found.number}")
    return Checkpoint(
        number=number,
        place=Place.from_dict(tree["place"]),
        config=tree["config"],
        world_size=tree["world_size"],
        metrics_bytes=tree["metrics_bytes"],
        metrics_sha256=found.metrics_sha256,
        boundary_bytes=tree["boundary_bytes"],
        base=found.base,
        files=found.files,
    )


def _digest(tree: dict) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
