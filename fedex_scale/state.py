"""What a run knows between two rounds, and where it lies on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The server after `round` rounds. Everything large is on disk.

    Fields:
        round: rounds done; 0 before the first.
        has_side: the side adapter holds something and takes part in the forward pass.
        base_changed: folds have changed the base weights, so that the run must save them.
    """

    round: int = 0
    has_side: bool = False
    base_changed: bool = False


@dataclass(frozen=True)
class RunDir:
    """The paths of a run directory."""

    path: Path

    def client(self, round: int, client: int) -> Path:
        return self.path / "clients" / f"round-{round:04d}" / f"client-{client:04d}"

    def server(self, round: int) -> Path:
        """What the server holds after a round: adapter/, residual/, side/, aggregate.json."""
        return self.path / "server" / f"round-{round:04d}"

    def adapter(self, round: int) -> Path:
        return self.server(round) / "adapter"

    def residual(self, round: int) -> Path:
        return self.server(round) / "residual"

    def side(self, round: int) -> Path:
        return self.server(round) / "side"

    def evaluation(self, round: int) -> Path:
        return self.path / "evaluations" / f"round-{round:04d}"

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
