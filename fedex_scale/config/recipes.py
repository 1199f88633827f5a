"""The recipes that come along: what each is for, and a copy of one to change."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from fedex_scale.config.describe import SCHEMA
from fedex_scale.config.shipped import locate, names_of
from fedex_scale.config.words import named, nearest
from fedex_scale.runtime.errors import UserError

_HARDWARE = "Hardware: "


class Recipe(NamedTuple):
    """What a recipe's head says.

    Fields:
        purpose: one sentence or a part of it; what it trains on what.
        hardware: what it runs on.
    """

    name: str
    purpose: str
    hardware: str


def recipes() -> list[Recipe]:
    """Return every recipe that comes along, by name."""
    return [_read(name) for name in names_of("recipes")]


def text_of(name: str) -> str:
    """Return a recipe as it comes along, in which editors find the schema from anywhere.

    Raises:
        UserError: no recipe of that name; the nearest is told.
    """
    known = names_of("recipes")
    if name not in known:
        raise UserError(
            f"recipe: expected one of {', '.join(known)}, got {named(name)}; "
            f"{nearest(name, known) or 'name one of these'}"
        )
    text = locate("recipes", name, "recipe").read_text(encoding="utf-8")
    return re.sub(r"(?<=[$]schema=)\S+", SCHEMA.as_uri(), text, count=1)


def copy(name: str, directory: Path) -> Path:
    """Copy a recipe to change it, and return the copy.

    Raises:
        UserError: no such recipe, a file of that name is there, or the directory cannot be written.
    """
    text, file = text_of(name), directory / f"{name}.yaml"
    text = re.sub(rf"(?<=--config ){name}\b", lambda found: shlex.quote(str(file)), text)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_new(file, text)
    except FileExistsError:
        taken = file if directory.is_dir() else directory
        raise UserError(f"--out: {taken} exists; choose another directory, or delete it") from None
    except OSError as error:
        raise UserError(
            f"--out: cannot write {file} ({error.strerror}); choose another directory"
        ) from None
    return file


def _write_new(file: Path, text: str) -> None:
    with file.open("x", encoding="utf-8") as out:
        try:
            out.write(text)
            out.flush()
        except OSError:
            file.unlink()
            raise


def _read(name: str) -> Recipe:
    """Return what a recipe's head says: a paragraph and a line of hardware."""
    lines = [line.removeprefix("#").strip() for line in text_of(name).splitlines()]
    purpose = lines[lines.index("") + 1]
    (hardware,) = [line for line in lines if line.startswith(_HARDWARE)]
    return Recipe(name, purpose, hardware.removeprefix(_HARDWARE))
