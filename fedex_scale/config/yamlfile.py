"""YAML as anyone may have written it: of a regular file, bounded, plain, nothing said twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedex_scale.config.shipped import remedy
from fedex_scale.config.words import shown
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 20
MAX_CHARS = 10_000  # of one value; Python takes long to read a number of more digits


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: it cannot be read, is not a regular file, is too large, or is not plain YAML.
    """
    try:
        raw = door.read_bytes(path, most=MAX_BYTES)
    except OSError as error:
        raise UserError(
            f"--config: cannot read {path} ({error.strerror}); {remedy('recipes', path)}"
        ) from None
    try:
        return parse_yaml(raw.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({_reason(error)}); correct it") from None


def parse_yaml(text: str) -> Any:
    """Return what YAML holds.

    Raises:
        yaml.YAMLError: it is not valid, or holds what no setting needs.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except ValueError as error:  # a date that is none, a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from None


def _reason(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start}: {error.reason}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.position}: {error.reason}"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", str(error))
    return f"line {mark.line + 1}: {problem}" if mark else problem


class _PlainLoader(yaml.SafeLoader):
    """Takes single values, lists and mappings, and no more of them than settings need."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH or self._nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES:,} values, or {MAX_DEPTH} within each other")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"expected no tag, got {shown(event.tag)}")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode):
            half = any("\ud800" <= letter <= "\udfff" for letter in node.value)
            if len(node.value) > MAX_CHARS or "\0" in node.value or half:
                self._refuse(event, f"expected at most {MAX_CHARS:,} characters, and no NUL")
        elif isinstance(event, yaml.AliasEvent):  # each may hold many of the one before
            self._refuse(event, f"expected an alias of one value only, got *{event.anchor}")
        elif isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        self._depth -= 1
        return node

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "expected a name as key, got a list or a mapping")
            if key.value in seen:
                self._refuse(key, f"{shown(key.value)} is there twice; keep one")
            seen.add(key.value)

    def _refuse(self, place: yaml.Event | yaml.Node, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)
