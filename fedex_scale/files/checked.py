"""A JSON file as a kind: a model with bounds that it is held to, or refused by on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedex_scale.config.words import shown
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

K = TypeVar("K", bound="Kind")

MAX_CLIENTS, MAX_ROUNDS, MAX_LAYERS = 1_000_000, 100_000, 100_000
Count = Annotated[int, Field(ge=0, lt=2**53)]
Index = Annotated[int, Field(ge=0, lt=MAX_CLIENTS)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Norm = Annotated[float, Field(ge=0, le=1e300)]
Rank = Annotated[int, Field(ge=1, lt=2**20)]
Alpha = Annotated[float, Field(ge=1e-12, lt=1e30)]
Name = Annotated[str, Field(max_length=1000)]
Text = Annotated[str, Field(max_length=10_000)]
Round = Annotated[int, Field(ge=0, lt=MAX_ROUNDS)]
Names = Annotated[list[Name], Field(max_length=MAX_LAYERS)]

_WORDS = {  # pydantic's, and this project's
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid ": "a ",
}


class Kind(BaseModel):
    """A JSON object of a known kind: strict, finite, and with what else it holds left as it is."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


def check(kind: type[K], tree: Any, what: str | Path, remedy: str) -> K:
    """Return a JSON object as a kind.

    Args:
        what: the file, or where in it.

    Raises:
        UserError: it is not that; the message names the key.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{what}: {_problem(error, tree)}; {remedy}") from None


def read(
    kind: type[K], path: Path, remedy: str = "restore this file of the run", *, finite: bool = True
) -> K:
    """Return a file's object as a kind.

    Args:
        finite: refuse NaN and Infinity.

    Raises:
        OSError: it is not there, or may not be read.
        UserError: it is no such file; the message names file and key.
    """
    tree = door.read_json(path, remedy, inside=path.parent, finite=finite)
    return check(kind, tree, path, remedy)


def _problem(error: ValidationError, tree: Any) -> str:
    """Return the first thing that is wrong, of what may be thousands."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [part for part in first["loc"] if not isinstance(part, str) or "[" not in part]
    value, known = tree, []
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue  # a word of pydantic's for one of several types
        known.append(str(part))
    key = ".".join(known) or "it"
    if first["type"] == "missing":
        return f"expected {'.'.join(map(str, path))}, got none"
    reason = first["msg"].replace("Input should be ", "")
    if "dictionary or instance of" in reason:
        reason = "an object"
    for theirs, ours in _WORDS.items():
        reason = reason.replace(theirs, ours)
    return f"{key:.200}: expected {reason}, got {shown(value)}"
