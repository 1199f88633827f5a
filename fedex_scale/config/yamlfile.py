"""YAML as anyone may have written it: of a regular file, bounded, plain, nothing said twice."""

from __future__ import annotations

import re
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
MAX_CHARS = 10_000  # of one value
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})$")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+][0-9]{1,9})?$|[-+]?\.inf$|\.nan$")
_BOTH_READ = ("bool", "null", "merge")
"""Of YAML 1.1's words these alone. Its octal, sexagesimal and underlined numbers and its dates are
text here, as editors, which read YAML 1.2, have them; a longer number is no setting."""


class Refused(yaml.MarkedYAMLError):
    """Valid YAML that holds what no setting needs, or says something twice."""


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
    except ValueError as error:
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
            if len(node.value) > MAX_CHARS or "\0" in node.value:
                self._refuse(event, f"expected at most {MAX_CHARS:,} characters, and no NUL")
            if any("\ud800" <= letter <= "\udfff" for letter in node.value):
                self._refuse(event, f"expected characters, got half of one in {shown(node.value)}")
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
            if key.tag.endswith(":merge"):
                self._refuse(key, "expected keys written out, got a merge (<<)")
            meant = self.construct_object(key)  # yes and true are one
            if meant in seen:
                self._refuse(key, f"{shown(key.value)} is there twice; keep one")
            seen.add(meant)

    def _refuse(self, place: yaml.Event | yaml.Node, problem: str) -> None:
        raise Refused(problem=problem, problem_mark=place.start_mark)


def _read_as(kind: str) -> str:
    return f"tag:yaml.org,2002:{kind}"


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in known if tag in map(_read_as, _BOTH_READ)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(_read_as("int"), _INTEGER, list("-+0123456789"))
_PlainLoader.add_implicit_resolver(_read_as("float"), _FLOAT, list("-+0123456789."))
