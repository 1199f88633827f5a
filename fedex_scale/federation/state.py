"""What a run knows between two rounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


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
