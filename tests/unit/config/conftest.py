"""A config as short as can be, written and loaded with what a test changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config


@pytest.fixture
def load(tmp_path: Path):
    """Load a run's YAML: overrides, and its text or what its sections have besides."""

    def load(*overrides: str, text: str | None = None, **sections: object) -> Config:
        path = tmp_path / "run.yaml"
        tree = {"model": {"path": "some/model"}, "data": {"path": "rows.jsonl"}, **sections}
        path.write_text(yaml.safe_dump(tree) if text is None else text, encoding="utf-8")
        return load_config(path, overrides)

    return load
