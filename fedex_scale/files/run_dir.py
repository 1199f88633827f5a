"""The layout of a run's directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


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
