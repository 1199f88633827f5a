"""Whether what the settings name is on this machine; known before anything heavy is imported."""

from __future__ import annotations

import glob
from pathlib import Path

from fedex_scale.config.learning import DataConfig, ModelSection
from fedex_scale.config.settings import Config, RunSection
from fedex_scale.config.sites import SUFFIXES, check_sites
from fedex_scale.runtime.errors import UserError


def check_places(config: Config) -> None:
    """Raise a UserError for a run directory that is taken, or for a file that is not there."""
    check_free(config.run)
    check_model(config.model)
    check_data(config.data)
    check_sites(config.partition.files)


def check_free(section: RunSection) -> None:
    """Raise a UserError where a new run would take the place of another."""
    if section.path.exists() and section.resume != "auto" and not section.overwrite:
        raise UserError(
            f"run.name: {section.path} exists; --resume to go on with it, choose another "
            "run.name, or run.overwrite=true to delete it"
        )


def check_model(section: ModelSection) -> None:
    """Raise a UserError where the path is one of this machine, and no model lies there."""
    if section.config:
        return
    path = Path(section.path)
    local = path.exists() or section.path.startswith((".", "/", "~")) or section.path.count("/") > 1
    if local and not (path / "config.json").is_file():
        raise UserError(
            f"model.path: expected a model directory or a hub id, got {section.path}, "
            "which has no config.json; correct the path (make model fetches the quickstart's)"
        )


def check_data(section: DataConfig) -> None:
    """Raise a UserError where a file or glob of this machine is named, and nothing is there."""
    named = section.local is None and Path(section.path).suffix in SUFFIXES
    if named and "**" not in section.path and not glob.glob(section.path):
        raise UserError(
            f"data.path: expected a file, found none at {section.path}; correct the path"
        )
