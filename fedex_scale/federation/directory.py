"""A run's directory: held by one process, made, or taken back to where a run goes on."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from fedex_scale.config.places import check_free
from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.config.yamlfile import read_yaml
from fedex_scale.federation.checkpoint import Checkpoint, rewind
from fedex_scale.federation.resume import FREE, Found, differences, find
from fedex_scale.files.adapters import Adapter, base_name
from fedex_scale.files.run_dir import CONFIG_FILE, RunDir
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.faults import disk_errors
from fedex_scale.runtime.outputs import lock, make_parents, sync, write_file

SHARED_WAIT_S = 20.0
"""A network's file system may show a new file late."""


def check_directory(config: Config) -> Found:
    """Return where to go on from, if the run is to resume one that is there.

    Raises:
        UserError: the run directory is in use, cannot be gone on from, or cannot be written.
    """
    path = config.run.path
    if path.exists() and config.run.resume == "auto":
        RunDir(path).check_links()
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


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """Hold the run directory's lock, beside it, which dies with this process.

    Raises:
        UserError: another process has it, or the place cannot be written.
    """
    # Of the place itself, whichever links lead there.
    path, parent = run.path.resolve(), run.path.resolve().parent
    with ExitStack() as stack:
        try:
            make_parents(parent)
            what = f"run.name: {path}"
            stack.enter_context(lock(parent / f".{path.name}.lock", what))
        except OSError as error:
            raise UserError(
                f"run.dir: cannot write to {parent} ({error.strerror}); choose another run.dir"
            ) from None
        yield


def prepare_directory(
    config: Config, run: RunDir, partition: dict, last: Checkpoint | None
) -> None:
    """Make the run directory, or take it back to the checkpoint to go on from."""
    with disk_errors(str(run.path)):
        text = json.dumps(partition, indent=2) + "\n"
        if last is None:
            make_directory(config, run, text)
            return
        digest = hashlib.sha256(text.encode()).hexdigest()
        if last.files.get("partition.json", (0, digest))[1] != digest:
            raise UserError(
                f"resume: {run.path}: the data are others than those it was begun with; bring "
                "them back, or choose another run.name"
            )
        rewind(run, last)
        write_file(run.path / "partition.json", text)
        own = to_dict(config)
        own["run"] |= {key: last.config["run"][key] for key in ("resume", "overwrite")}
        write_file(run.path / CONFIG_FILE, yaml.safe_dump(own, sort_keys=False))


def restore_config(run: RunDir, last: Checkpoint) -> None:
    """Write config.yaml again where a power cut damaged it; every checkpoint holds it, too."""
    whole = False
    with suppress(UserError, LookupError, AttributeError):
        there = to_dict(run.config())
        text = read_yaml(run.path / CONFIG_FILE)
        whole = all(text[name].keys() == keys.keys() for name, keys in last.config.items())
        whole = whole and not differences(there, last.config) - FREE
    if not whole:
        write_file(run.path / CONFIG_FILE, yaml.safe_dump(last.config, sort_keys=False))


def check_base(
    config: Config, digests: dict[str, tuple[int, str]], last: Checkpoint | None
) -> None:
    """Raise a UserError where the base's files are others than those the run was begun with."""
    if last is None:
        return
    changed = [name for name, entry in last.base.items() if digests.get(name) != entry]
    changed += [name for name in digests if name not in last.base and name.endswith(".safetensors")]
    if changed:
        raise UserError(
            f"resume: {', '.join(changed)} was changed since the run was begun (the model is "
            f"{config.model.path}); bring the files back, or choose another run.name"
        )


def check_shared(folder: Path) -> None:
    """Raise a UserError where a rank does not see what rank 0 writes; every rank must take part."""
    token = distributed.on_main(lambda: _put_token(folder))

    def look() -> None:
        deadline = time.monotonic() + SHARED_WAIT_S
        while not token.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.dir: rank {distributed.rank()} on {socket.gethostname()} does not see "
                    f"{folder} of rank 0; choose a run.dir on a file system that all machines share"
                )
            time.sleep(0.1)

    distributed.together(look)
    distributed.on_main(token.unlink)


def _put_token(folder: Path) -> Path:
    token = folder / f".seen-{secrets.token_hex(8)}"
    with disk_errors(str(folder)):
        token.touch()
    return token


def make_directory(config: Config, run: RunDir, partition: str) -> None:
    """Make the run directory, with what was decided before the first step, at one stroke."""
    new, old = (run.path.with_name(f".{run.path.name}.{word}") for word in ("new", "old"))
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    new.mkdir(parents=True)
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_file(new / CONFIG_FILE, text)
    write_file(new / "partition.json", partition)
    if run.path.exists():
        run.path.rename(old)
    new.rename(run.path)
    sync(run.path.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_head(begun: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError where a run that is resumed has another head than it was begun with.

    Args:
        begun: the server's first adapter.
        shapes: of what is trained whole, by name.
    """
    for name, (_, shape) in begun.full_specs().items():
        found = shapes.get(base_name(name))
        if found != shape:
            raise UserError(
                f"resume: expected the head that the run was begun with, {name} {shape}, got "
                f"{found or 'none'}; bring the model and the labels back, or choose another "
                "run.name"
            )
