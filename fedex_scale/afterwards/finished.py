"""Whether a directory is a finished run; known before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime.errors import UserError


def finished(path: Path) -> RunDir:
    """Return the run of a directory.

    Raises:
        UserError: it is none, or has not come to its end.
    """
    run = RunDir(path)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run's directory, found no config.yaml; name a run")
    if not (run.final / "adapter").is_dir():
        raise UserError(
            f"{path}: expected a finished run, found no {run.final / 'adapter'}; let it finish"
        )
    return run
