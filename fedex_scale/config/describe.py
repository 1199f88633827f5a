"""What every setting is: one by one, as a YAML, as a page, and as a schema that editors read.

`python -m fedex_scale.config.describe` writes docs/configuration.md and schema.json anew.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import GenerateJsonSchema

from fedex_scale.config.section import Section, key_schemas
from fedex_scale.config.settings import Config
from fedex_scale.config.words import expected, named, nearest
from fedex_scale.runtime.errors import UserError

SCHEMA = Path(__file__).with_name("schema.json")
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_TEMPLATE_HEAD = """\
# Every setting of a run with its default. Fill in model.path and data.path, and leave out what you
# do not change.
"""
_PAGE_HEAD = """\
# Configuration

<!-- Written by `python -m fedex_scale.config.describe`. -->

A run is one YAML of these sections. Only `model.path` (or `model.config`) and `data.path` have to \
be given. Any value can be changed on the command line, as `section.key=value`. The same in other \
forms: `fedex-scale config` prints a YAML with every default, `fedex-scale config --explain KEY` \
tells of one key, `fedex-scale config --check FILE` looks a file over, and editors that know the \
YAML language server complete the keys of a file that begins as those in `launch/` do.
"""


def explain(name: str) -> str:
    """Return what a key, as section.key, or each key of a section may be and does.

    Raises:
        UserError: no such key; the nearest is named.
    """
    known = {
        f"{title}.{key}": schema
        for title, section in _sections().items()
        for key, schema in key_schemas(section).items()
    }
    found = [full for full in known if name in (full, full.partition(".")[0])]
    if not found:
        hint = (
            nearest(name, [*_sections(), *known]) or f"known sections are {', '.join(_sections())}"
        )
        raise UserError(f"--explain: unknown key {named(name)}; {hint}")
    return "\n\n".join(f"{full}: {_value(known[full])}\n{_said(known[full])}" for full in found)


def template() -> str:
    """Return a YAML with every setting explained and at its default."""
    lines = [_TEMPLATE_HEAD]
    for title, section in _sections().items():
        lines.append(f"{title}:  # {_flat(section.__doc__)}\n")
        for key, schema in key_schemas(section).items():
            said = f"{_said(schema)} Expected: {_value(schema)}."
            lines += [f"  # {line}\n" for line in textwrap.wrap(said, 96, break_long_words=False)]
            lines.append(f"  {key}: {_as_yaml(schema.get('default'))}\n")
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [_PAGE_HEAD]
    for title, section in _sections().items():
        parts.append(f"\n## {title}\n\n{_flat(section.__doc__)}\n\n")
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n")
        for key, schema in key_schemas(section).items():
            default = f"`{_as_yaml(schema['default'])}`" if "default" in schema else "required"
            cells = (f"`{key}`", expected(schema), default, _said(schema))
            parts.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n")
    return "".join(parts)


def schema() -> str:
    """Return the JSON schema of a run's YAML."""
    tree = Config.model_json_schema(schema_generator=_Untitled)
    for section in tree["$defs"].values():
        for key in section["properties"].values():
            if {"type": "null"} in key.get("anyOf", ()):
                key["anyOf"].append({"const": "none"})  # null, in the words of the descriptions
    for name, section in tree["properties"].items():  # one without keys is as one left out
        tree["properties"][name] = {"anyOf": [section, {"type": "null"}]}
    tree["required"].remove("data")  # as partition.files may stand in its place
    head = {"$schema": GenerateJsonSchema.schema_dialect, "title": "A run of fedex_scale"}
    return json.dumps(tree | head, indent=2) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")


def _sections() -> dict[str, type[Section]]:
    return {title: field.annotation for title, field in Config.model_fields.items()}


def _value(schema: dict[str, Any]) -> str:
    default = f"default {_as_yaml(schema['default'])}" if "default" in schema else "required"
    return f"{expected(schema)}; {default}"


def _said(schema: dict[str, Any]) -> str:
    return _flat(schema["description"])


def _flat(text: str) -> str:
    return " ".join(text.split())


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


class _Untitled(GenerateJsonSchema):
    """Gives keys no titles, which would only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


if __name__ == "__main__":
    main()
