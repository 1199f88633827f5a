"""When a run saves its place, and where one that was interrupted goes on.

What a finished client sends is written, and the run's place after it saved, in a thread while the
next client trains: from its first step on, so that the switch is left alone, to its second, so that
a full disk is told soon; and before anything is done that needs the files.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

from torch import Tensor

from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.engine.build import Engine
from fedex_scale.engine.parameters import Source
from fedex_scale.federation import checkpoint
from fedex_scale.federation.checkpoint import Checkpoint
from fedex_scale.federation.client import ClientUpdate, take_factors, write_adapter, write_client
from fedex_scale.federation.snapshot import read_snapshot, snapshot_bytes, write_snapshot
from fedex_scale.federation.state import ClientProgress, Place
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime import distributed, faults
from fedex_scale.runtime.errors import ClientFailure, UserError
from fedex_scale.runtime.phases import phase


class Saver:
    """Writes clients and checkpoints of one run; every rank must take part in each call.

    Leaving the `with` block waits for what is still being written.

    Args:
        last: where the run goes on; none: it begins.
        base: size and SHA-256 of the base's files, which every checkpoint notes.

    Attributes:
        place: the last one that was saved, or is being saved; None at the beginning.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        run: RunDir,
        last: Checkpoint | None,
        base: dict[str, tuple[int, str]] | None = None,
    ) -> None:
        self._config, self._engine, self._run, self._last = config, engine, run, last
        self._base = base or {}
        self.place = last.place if last else None
        self._thread, self._may_begin = ThreadPoolExecutor(max_workers=1), Event()
        self._behind: Callable[[], Checkpoint] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        self._may_begin.set()
        self._thread.shutdown(wait=True)

    @phase("checkpointing")
    def save(self, place: Place) -> None:
        """Write a checkpoint of this place.

        Raises:
            UserError: the disk is full, or cannot be written; the one before stays.
        """
        self.settle()
        number, scratch = self._next()
        size = self._size() if place.running else 0
        distributed.on_main(lambda: self._begin(scratch, size))
        if place.running is not None:
            with faults.disk_errors(str(scratch)):
                config = self._config
                write_adapter(
                    self._engine, scratch / "adapter", config.lora, config.model.path, who="client"
                )
            distributed.together(lambda: self._write_snapshot(scratch))
        self._last = distributed.on_main(
            lambda: self._publish(scratch, number, place, self._metrics_bytes())
        )
        self.place = place

    @phase("writing")
    def settle(self) -> None:
        """Wait until the last client is written and its place saved.

        Raises:
            UserError: the disk is full, or cannot be written; the checkpoint before stays.
        """
        self._may_begin.set()
        if self._behind is not None:
            behind, self._behind = self._behind, None
            self._last = distributed.on_main(behind)

    @phase("writing")
    def _save_behind(
        self, place: Place, update: ClientUpdate, factors: Mapping[str, Pair | Tensor]
    ) -> None:
        """Have a finished client written, and then a checkpoint of this place."""
        self.settle()
        self._may_begin.clear()
        self.place = place
        self._behind = lambda: self._last  # what the other ranks wait for
        if not distributed.is_main():
            return
        (number, scratch), length = self._next(), self._metrics_bytes()
        directory = self._run.client(update.round, update.client)
        lora, base = self._config.lora, self._config.model.path

        def write() -> Checkpoint:
            self._may_begin.wait()
            with faults.disk_errors(str(directory)):
                write_client(self._engine, update, factors, directory, lora, base)
            self._begin(scratch, 0)
            return self._publish(scratch, number, place, length)

        self._behind = self._thread.submit(write).result

    def attempt(
        self,
        client: int,
        train: Callable[[ClientProgress], ClientUpdate],
        log: Callable[..., None],
    ) -> None:
        """Train a client from where it is; if it fails, do as the config says.

        It is written, and the place saved, while the next one begins.

        Raises:
            UserError: the disk has no room for its adapter.
            ClientFailure: it failed, and the run is to stop, or it failed twice.
        """
        room = 2 * adapter_bytes(self._config, self._engine)
        distributed.on_main(lambda: self._check_room(room, f"client {client}'s adapter"))
        place = self.place
        begin = place.running or ClientProgress(client=client)
        action = self._config.federation.on_client_failure
        failed = {"round": place.state.round + 1, "client": client, "action": action}
        try:
            update, factors = self._trained(train, begin)
        except ClientFailure as failure:
            if action == "stop" or begin.attempt:
                raise
            log("failure", reason=str(failure), **failed)
            if action == "skip":
                self.save(replace(place, skipped=(*place.skipped, client), running=None))
                return
            update, factors = self._trained(train, ClientProgress(client=client, attempt=1))
        log("client", **vars(update))
        place = replace(place, done=(*place.done, client), running=None)
        self._save_behind(place, update, factors)

    def after_step(self, progress: ClientProgress) -> None:
        """Write a checkpoint of the running client if one is due, or if the run is to stop.

        Raises:
            Stopped: a signal came.
        """
        if self._may_begin.is_set():
            self.settle()
        self._may_begin.set()
        every = self._config.run.save_steps
        number = faults.asked_to_stop()
        if number or (every and progress.step % every == 0):
            self.save(replace(self.place, running=progress))
        if number:
            raise faults.Stopped(number, f"in {self.place}")

    def adapter(self) -> Source:
        """Return the running client's adapter, by layer."""
        return Adapter(self._run.checkpoint(self._last.number) / "adapter").weights

    def restore(self) -> None:
        """Set the running client's moments and random states on this rank."""
        folder = self._run.checkpoint(self._last.number)
        read_snapshot(self._engine, folder / _snapshot_name())

    def _trained(
        self, train: Callable[[ClientProgress], ClientUpdate], begin: ClientProgress
    ) -> tuple[ClientUpdate, dict[str, Pair | Tensor]]:
        """Train a client, and return what it sends."""
        update = train(begin)
        with phase("writing"):
            who = f"round {update.round}, client {update.client}"
            return update, take_factors(self._engine, who=who)

    def _next(self) -> tuple[int, Path]:
        """Return the next checkpoint's number, and where it is made ready."""
        number = self._last.number + 1 if self._last else 0
        return number, self._run.checkpoints / f".{number:06d}"

    def _metrics_bytes(self) -> int:
        return self._run.metrics.stat().st_size if self._run.metrics.exists() else 0

    def _size(self) -> int:
        """Return the bytes that a checkpoint of a running client takes."""
        ranks = distributed.sum_over_ranks(snapshot_bytes(self._engine))[0]
        return int(ranks) + adapter_bytes(self._config, self._engine)

    def _check_room(self, num_bytes: int, what: str) -> None:
        free = shutil.disk_usage(self._run.path).free
        if num_bytes > free:
            raise UserError(
                f"{self._run.path}: {what}: expected {num_bytes / 1e6:.1f} MB of room, got "
                f"{free / 1e6:.1f} MB; free some space, and the same command with --resume goes on"
            )

    def _begin(self, scratch: Path, num_bytes: int) -> None:
        self._check_room(num_bytes + 2**16, "a checkpoint")
        with faults.disk_errors(str(scratch)):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

    def _write_snapshot(self, scratch: Path) -> None:
        with faults.disk_errors(str(scratch)):
            write_snapshot(self._engine, scratch / _snapshot_name())

    def _publish(self, scratch: Path, number: int, place: Place, length: int) -> Checkpoint:
        last, run = self._last, self._run
        if run.metrics.exists():
            checkpoint.sync(run.metrics)
        begun = place.running is not None and last is not None
        new = Checkpoint(
            number=number,
            place=place,
            config=to_dict(self._config),
            world_size=distributed.world_size(),
            metrics_bytes=length,
            boundary_bytes=last.boundary_bytes if begun else length,
            base=self._base,
        )
        with faults.disk_errors(str(scratch)):
            new = checkpoint.publish(run, scratch, new, last.files if last else {})
            checkpoint.prune(run, new, keep=self._config.run.keep)
        return new


def adapter_bytes(config: Config, engine: Engine) -> int:
    """Return the bytes of one adapter's weights on disk, float32."""
    whole = sum(math.prod(shape) for shape in engine.whole_shapes().values())
    return 4 * (config.lora.rank * sum(sum(shape) for shape in engine.shapes().values()) + whole)


def _snapshot_name() -> str:
    return f"rank-{distributed.rank():04d}.safetensors"
