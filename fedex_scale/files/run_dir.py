"""The layout of a run's directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.files import checked, kinds
from fedex_scale.runtime.errors import UserError

CONFIG_FILE = "config.yaml"
REPORT_FILE = "aggregate.json"
DEVIATION_FILE = "deviation.json"
WRITTEN = ("checkpoints", "clients", "evaluations", "final", "server", "metrics.jsonl")
"""What a run that goes on deletes in, or adds to, where it lies."""


@dataclass(frozen=True)
class RunDir:
    """The paths of a run directory."""

    path: Path

    def client(self, round: int, client: int) -> Path:
        return self.path / "clients" / f"round-{round:04d}" / f"client-{client:04d}"

    def server(self, round: int) -> Path:
        """What a round made: adapter/, residual/, side/ (its new columns), aggregate.json."""
        return self.path / "server" / f"round-{round:04d}"

    def round(self, number: int) -> kinds.RoundFile:
        """Return what a round did, as its report says."""
        return checked.read(kinds.RoundFile, self.server(number) / REPORT_FILE)

    def rounds_done(self) -> int:
        """Return how many rounds left a report, one after another."""
        last = 0
        while (self.server(last + 1) / REPORT_FILE).is_file():
            last += 1
        return last

    def check_links(self) -> None:
        """Raise a UserError where a run that goes on would write or delete behind a link."""
        tops = [self.path / name for name in WRITTEN]
        below = (
            Path(folder) / name
            for top in tops
            for folder, folders, files in os.walk(top)
            for name in (*folders, *files)
        )
        for path in chain(tops, below):
            if path.is_symlink():
                raise UserError(
                    f"{path}: expected the run's own, got a link; put what it leads to in its "
                    "place, or choose another run.name"
                )

    def config(self) -> Config:
        """Return the settings, checked as when the run began.

        Raises:
            UserError: this is no run, or it has no settings that a run could have had.
        """
        file = self.path / CONFIG_FILE
        if not file.exists():
            raise UserError(
                f"{self.path}: expected a run directory with its {CONFIG_FILE}, found none; name a "
                "directory that fedex-scale run made, such as runs/quickstart"
            )
        return load_config(file)

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
        return any(self.round(number).base_changed for number in range(1, self.rounds_done() + 1))
