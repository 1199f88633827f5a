"""What a setting may be and what it is, in words: for errors, the docs and the command line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_KINDS = {  # JSON schema's types, alone and in a list
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "text"),
    "boolean": ("true or false", "true or false"),
    "null": ("null", "null"),
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def expected(schema: Mapping[str, Any], *, plural: bool = False) -> str:
    """Return what a value of this JSON schema is, such as `a whole number of at least 1`."""
    if "anyOf" in schema:
        told = [expected(option) for option in schema["anyOf"]]
        return ", or ".join(told) if any(" or " in x for x in told) else " or ".join(told)
    if "enum" in schema:
        return f"{'any' if plural else 'one'} of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        filled = "non-empty " if schema.get("minItems") else ""
        return f"a {filled}list of {expected(schema['items'], plural=True)}"
    if schema["type"] == "object":
        return f"a mapping of names to {expected(schema['additionalProperties'])}"
    kind = _KINDS[schema["type"]][plural]
    if "minimum" in schema and "maximum" in schema:
        kind += f" from {_bound(schema['minimum'])} to {_bound(schema['maximum'])}"
    elif bounds := " and ".join(
        f"{word} {_bound(schema[name])}" for name, word in _BOUNDS.items() if name in schema
    ):
        kind += f" of {bounds}" if bounds.startswith("at ") else f" {bounds}"
    return f"non-empty {kind}" if schema.get("minLength") else kind


def _bound(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def choices(schema: Mapping[str, Any]) -> list[str]:
    """Return the words that a value of this JSON schema may be; none where it is free."""
    alternatives = (schema, schema.get("items", {}), *schema.get("anyOf", ()))
    return [str(word) for option in alternatives for word in option.get("enum", ())]


def shown(value: Any) -> str:
    """Return a value as an error shows it: on one line, bounded, without control characters."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def named(key: Any) -> str:
    """Return a key or a path that the user wrote as an error shows it."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 100 else shown(text)


def nearest(word: Any, known: Collection[str]) -> str | None:
    """Return `did you mean ...?`, or None where nothing known is like the word."""
    near = difflib.get_close_matches(str(word)[:100], known, n=1)
    return f"did you mean {near[0]}?" if near else None
