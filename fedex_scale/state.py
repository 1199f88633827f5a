"""What a run knows between two rounds, and where it lies on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The server after `round` rounds. Everything large is on disk.

    Fields:
        round: rounds done; 0 before the first.
        has_side: the side adapter, or the second plane, takes part in the forward pass.
        base_changed: folds have changed the base weights or their planes, so that the run must hand
            over a base, and fold anew when it is resumed.
    """

    round: int = 0
    has_side: bool = False
    base_changed: bool = False


@dataclass(frozen=True, kw_only=True)
class ClientProgress:
    """How far the running client has come, and what its `ClientUpdate` will tell of it.

    Fields:
        attempt: 0, or 1 where it is trained again after it failed.
        step: optimizer steps done.
    """

    client: int
    attempt: int = 0
    step: int = 0
    num_tokens: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """How far a run has come: all that a checkpoint says besides files.

    Fields:
        evaluated: the server's model was scored after `state.round`.
        done: clients of the next round whose adapters are complete.
        skipped: clients of the next round that failed and are left out.
        running: the client that is being trained, if it has done a step.
        finished: the final files are written.
    """

    state: ServerState = field(default_factory=ServerState)
    evaluated: bool = False
    done: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    running: ClientProgress | None = None
    finished: bool = False

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict) -> Place:
        running = tree["running"]
        return cls(
            state=ServerState(**tree["state"]),
            evaluated=tree["evaluated"],
            done=tuple(tree["done"]),
            skipped=tuple(tree["skipped"]),
            running=ClientProgress(**running) if running else None,
            finished=tree["finished"],
        )

    def __str__(self) -> str:
        if self.finished:
            return "the end"
        if self.running is not None:
            where = f"client {self.running.client}, after step {self.running.step}"
            return f"round {self.state.round + 1}, {where}"
        if self.done or self.skipped:
            return f"round {self.state.round + 1}, after client {max(self.done + self.skipped)}"
        return f"the end of round {self.state.round}" if self.state.round else "the beginning"


@dataclass(frozen=True)
class RunDir:
    """The paths of a run directory."""

    path: Path

    def client(self, round: int, client: int) -> Path:
        return self.path / "clients" / f"round-{round:04d}" / f"client-{client:04d}"

    def server(self, round: int) -> Path:
        """What a round made: adapter/, residual/, side/ (its new columns), aggregate.json."""
        return self.path / "server" / f"round-{round:04d}"

    def adapter(self, round: int) -> Path:
        return self.server(round) / "adapter"

    def residual(self, round: int) -> Path:
        return self.server(round) / "residual"

    def side(self, round: int) -> Path:
        return self.server(round) / "side"

    def evaluation(self, round: int) -> Path:
        return self.path / "evaluations" / f"round-{round:04d}"

    def checkpoint(self, number: int) -> Path:
        return self.checkpoints / f"{number:06d}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def base_changed(self) -> bool:
        """Tell whether a fold changed the base, as the rounds' reports say."""
        reports = sorted(self.path.glob("server/round-*/aggregate.json"))
        return any(json.loads(file.read_text())["base_changed"] for file in reports)


def derive_seed(*parts: int | str) -> int:
    """Return a 32-bit seed that depends on all of `parts` and on nothing else."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
