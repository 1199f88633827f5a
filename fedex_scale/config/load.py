"""One YAML a run: read, changed by `section.key=value` overrides, and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml

from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.config.shipped import locate
from fedex_scale.config.words import named, shown
from fedex_scale.config.yamlfile import MAX_DEPTH, Refused, parse_yaml, read_yaml
from fedex_scale.runtime.errors import UserError

Source = str | os.PathLike[str] | Mapping[str, Any] | Config


def load_config(
    source: Source, overrides: Sequence[str] | Mapping[str, Any] | None = None
) -> Config:
    """Read a run's settings, apply overrides, and check everything.

    Args:
        source: a YAML's path, the name of a recipe that comes along, a tree of sections, or a
            config.
        overrides: `section.key=value`, its value read as YAML, or a mapping of section.key to
            values.

    Raises:
        UserError: no such file or recipe, not a mapping, an unknown key, a value that cannot be.
            All problems that can be seen at once are named at once.
    """
    tree = _tree(source)
    if not isinstance(overrides, Iterable | None):
        raise UserError(f"overrides: expected a list or a mapping, got {shown(overrides)}")
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            _set(tree, str(name), deepcopy(value), name)
    else:
        for override in [overrides] if isinstance(overrides, str) else overrides or ():
            if not isinstance(override, str):
                raise UserError(f"override: expected section.key=value, got {shown(override)}")
            _apply_override(tree, override)
    return Config(**{str(name): _section(value) for name, value in tree.items()})


def _tree(source: Source) -> dict:
    """Return the sections as plain data that can be changed."""
    if isinstance(source, Config):
        return to_dict(source)
    if isinstance(source, Mapping):
        return {k: deepcopy(dict(v) if isinstance(v, Mapping) else v) for k, v in source.items()}
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"config: expected a path, a recipe's name or a mapping, got {shown(source)}; name one"
        )
    path = locate("recipes", source, "--config")
    tree = read_yaml(path)
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected sections (run, model, ...), got {type(tree).__name__}")
    return tree or {}


def _section(value: Any) -> Any:
    """Take a section that the YAML leaves empty, keys that it reads as numbers, and paths."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return value
    return {str(k): os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in value.items()}


def _apply_override(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override: expected section.key=value, got {shown(override)}")
    try:
        value = parse_yaml(text)
    except Refused as error:
        raise UserError(f"override: {shown(override)}: {error.problem}; correct it") from None
    except yaml.YAMLError:  # such as a glob
        value = text
    _set(tree, name.strip(), value, override)


def _set(tree: dict, name: str, value: Any, override: Any) -> None:
    """Set a key of a section, such as train.batch_size.

    Args:
        override: as the user wrote it, for the error.
    """
    *sections, key = name.split(".")
    if len(sections) > MAX_DEPTH:
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
    node[key] = value
