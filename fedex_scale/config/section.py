"""What all sections of the settings have in common: frozen, strict, and told of in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedex_scale.config.words import choices, expected, named, nearest, shown
from fedex_scale.runtime.errors import UserError

S = TypeVar("S", bound="Section")


_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def _as_number(value: Any) -> Any:
    """Parse a number that is given as text: YAML 1.1 reads 5e-4 so."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


MOST = 10**9
"""Of any count or number: more is a slip, and no memory, file format or float32 would hold it."""
MAX_NAME = 255  # bytes of a file's name
Number = Annotated[float, BeforeValidator(_as_number)]
Positive = Annotated[float, Field(gt=0, le=MOST), BeforeValidator(_as_number)]
Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_as_number)]
Count = Annotated[int, Field(ge=1, le=MOST)]
AsTuple = BeforeValidator(_as_tuple)
Names = Annotated[tuple[str, ...], AsTuple]


class Section(BaseModel):
    """A part of the settings; a subclass's `title` is its key in the YAML.

    Raises:
        UserError: when it is made, naming all that is wrong with it at once.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError("; ".join(_problems(type(self), values, error))) from None

    def problems(self) -> Iterator[str]:
        """Yield what does not go together, though each value is one that can be."""
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _none_is_null(cls, value: Any, about: ValidationInfo) -> Any:
        """Take the word none for null where a key may be null: so the descriptions have it.

        Null, as YAML reads `path=`, empties a text that may be empty.
        """
        field = cls.model_fields[about.field_name]
        if value in ("none", "None") and type(None) in get_args(field.annotation):
            return None
        return "" if value is None and field.default == "" else value

    @field_validator("*", mode="after")
    @classmethod
    def _names_are_short(cls, value: Any, about: ValidationInfo) -> Any:
        """Refuse what no file, column, module or task is called, before somebody looks for it."""
        for text in _texts(value):
            longest = max(len(part.encode()) for part in text.split("/"))
            if longest > MAX_NAME:
                title = cls.model_config.get("title")
                raise UserError(
                    f"{title}.{about.field_name}: expected names of at most {MAX_NAME} bytes, got "
                    f"{longest}: {shown(text)}; shorten it"
                )
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Section:
        found = "; ".join(self.problems())
        if found:
            raise UserError(found)
        return self


def replace(section: S, **changes: Any) -> S:
    """Return a section, or a whole config, with some values changed, checked like a new one."""
    return type(section)(**{**dict(section), **changes})


def to_dict(section: Section) -> dict[str, Any]:
    """Return the settings as plain data that YAML and JSON can hold."""
    return {name: _plain(value) for name, value in section}


def key_schemas(section: type[Section]) -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each key of a section."""
    return section.model_json_schema()["properties"]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _problems(
    cls: type[Section], values: Mapping[str, Any], error: ValidationError
) -> dict[str, None]:
    """Return a line for each key that is wrong, in order and each once."""
    lines: dict[str, None] = {}
    for found in error.errors(include_url=False):
        if found["type"] == "value_error":  # of a section within, or of values together
            lines[str(found["ctx"]["error"])] = None
        elif not found["loc"]:  # of a key that is no text
            lines[f"{cls.model_config.get('title') or 'config'}: {found['msg']}"] = None
        else:
            lines[_problem(cls, found["loc"][0], values, found["type"])] = None
    return lines


def _problem(cls: type[Section], key: str, values: Mapping[str, Any], kind: str) -> str:
    title = cls.model_config.get("title")
    name = named(f"{title}.{key}" if title else key)
    if kind == "extra_forbidden":
        known = cls.model_fields
        return f"{name}: unknown key; {nearest(key, known) or 'known are ' + ', '.join(known)}"
    if kind == "missing":
        return f"{name}: missing; add it to the config"
    if kind == "model_type":
        return f"{name}: expected a section with keys, got {shown(values[key])}"
    schema, value = key_schemas(cls)[key], values[key]
    remedy = nearest(value, choices(schema)) or (
        f"the default is {shown(schema['default'])}" if "default" in schema else "it has no default"
    )
    if value in choices(schema):
        remedy = f"write [{value}]"
    elif schema.get("type") == "string" and isinstance(value, bool | int | float):
        remedy = "put it in quotes (on a command line: key='\"text\"')"
    return f"{name}: expected {expected(schema)}, got {shown(value)}; {remedy}"
