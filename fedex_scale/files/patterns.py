"""Names of layers as PEFT's settings mean them: literally, or by a regular expression in time.

Regular expressions of strangers may backtrack for longer than anybody waits. Most settings are
plain names, which are looked up; for the others there is a bound on the time of all together.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import regex

from fedex_scale.runtime.errors import UserError

BUDGET_S = 1.0  # of this process, as the engine counts it
MAX_PATTERN = 1000
MAX_EXPRESSIONS = 100


class Matcher:
    """Matches names for one adapter, in bounded time.

    Args:
        who: whose settings they are, for an error.
    """

    def __init__(self, who: object) -> None:
        self._who, self._left = who, BUDGET_S
        self._compiled: dict[str, regex.Pattern] = {}

    def first(self, patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
        """Return the value of the first key that matches the end of a layer's name."""
        if not patterns:
            return default
        ends = set(_endings(layer))
        expressions = [key for key in patterns if not _is_literal(key)]
        literal = [key for key in ends if key in patterns]
        found = [key for key in expressions if self._matches(rf"(.*\.)?({key})", layer)]
        keys = {*literal, *found}
        if len(keys) > 1:
            return next(value for key, value in patterns.items() if key in keys)
        return patterns[keys.pop()] if keys else default

    def targets(self, wanted: str | Collection[str], layers: Iterable[str]) -> list[str]:
        """Return the layers that PEFT would adapt: the whole of a name matches, or its end."""
        if isinstance(wanted, str):
            if wanted == "all-linear":
                return list(layers)
            return [layer for layer in layers if self._matches(wanted, layer)]
        names = set(wanted)
        return [layer for layer in layers if not names.isdisjoint(_endings(layer))]

    def check(self, patterns: Iterable[str]) -> None:
        """Raise a UserError for an expression that is none, or too long to be tried."""
        expressions = [pattern for pattern in patterns if not _is_literal(pattern)]
        if len(expressions) > MAX_EXPRESSIONS:
            raise UserError(
                f"{self._who}: expected at most {MAX_EXPRESSIONS} regular expressions, got "
                f"{len(expressions)}; name the layers"
            )
        for pattern in expressions:
            self._compile(pattern)

    def _matches(self, pattern: str, name: str) -> bool:
        compiled, began = self._compile(pattern), time.process_time()
        try:
            return compiled.fullmatch(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise UserError(
                f"{self._who}: expected a pattern that is soon matched, got {pattern!r:.80}; name "
                "the layers"
            ) from None
        finally:
            self._left -= time.process_time() - began

    def _compile(self, pattern: str) -> regex.Pattern:
        if pattern not in self._compiled:
            try:
                if len(pattern) > MAX_PATTERN or not _is_plain(pattern):
                    raise regex.error("too long, or with more than an expression of names needs")
                self._compiled[pattern] = regex.compile(pattern)
            except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
                raise UserError(
                    f"{self._who}: expected the names of layers, got {pattern!r:.80} ({error}); "
                    "name each layer"
                ) from None
        return self._compiled[pattern]


def _is_literal(pattern: str) -> bool:
    """Return whether it matches itself alone; a dot is one, as in a layer's name."""
    return all(x.isalnum() or x in "._-" for x in pattern)


def _is_plain(pattern: str) -> bool:
    """Return whether the engine's bound on time holds: no counts of groups, no recursion.

    And no repeats within repeats, for which it takes gigabytes in that time.
    """
    counts = re.findall(r"(?<![)])\{\d{1,2}(?:,\d{1,2})?\}", pattern)
    if len(counts) != pattern.count("{") or len(counts) > 4:
        return False
    groups = re.findall(r"\(\?(?::|=|!|<=|<!)", pattern)
    few = len(groups) == pattern.count("(?") and pattern.count("(") <= 50
    return few and not _repeats_repeats(pattern)


def _repeats_repeats(pattern: str) -> bool:
    """Return whether a group that is repeated holds something that is."""
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern).replace("(?", "(")
    holds = [False]  # of each open group, whether it holds a repeat
    for letter, following in zip(bare, f"{bare[1:]} ", strict=True):
        if letter == "(":
            holds.append(False)
        elif letter == ")" and len(holds) > 1:
            inner = holds.pop()
            if inner and following in "+*":
                return True
            holds[-1] |= inner
        elif letter in "+*":
            holds[-1] = True
    return False


def _endings(name: str) -> Iterable[str]:
    """Yield a name, and what is left of it after each of its dots."""
    yield name
    for place, letter in enumerate(name):
        if letter == ".":
            yield name[place + 1 :]
