"""One YAML a run: read, changed by `section.key=value` overrides, and checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedex_scale.config.settings import Config
from fedex_scale.config.words import named, shown
from fedex_scale.config.yamlfile import MAX_DEPTH, parse_yaml, read_yaml
from fedex_scale.runtime.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Raises:
        UserError: no such file, not a mapping, an unknown key, a value that cannot be. All
            problems that can be seen at once are named at once.
    """
    tree = read_yaml(Path(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (run, model, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return Config(**{str(name): _section(value) for name, value in tree.items()})


def _section(value: Any) -> Any:
    """Take a section that the YAML leaves empty, and keys that it reads as numbers."""
    if value is None:
        return {}
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


def _apply_override(tree: dict, override: str) -> None:
    keys, equals, text = override.partition("=")
    *sections, key = keys.strip().split(".")
    if not equals or len(sections) > MAX_DEPTH:
        raise UserError(f"override: expected section.key=value, got {shown(override)}")
    node: Any = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(
                f"override: {named(section)} in {shown(override)} is a value and not a section"
            )
    try:
        node[key] = parse_yaml(text)
    except yaml.YAMLError:
        node[key] = text
