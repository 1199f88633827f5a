"""Print every dependency of pyproject.toml at its lower bound, a line each: `make test-lowest`."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SEPARATE = ("nlg", "images")
"""Extras that are left out: 100 MB of METEOR's data, and a torchvision of torch's very build."""


def lowest(project: dict) -> list[str]:
    """Return requirements such as `torch==2.13` of a pyproject.toml's `project`."""
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"]]
    bounds += [line for name, lines in extras.items() if name not in SEPARATE for line in lines]
    return [bound.replace(">=", "==") for bound in bounds]


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(lowest(tomllib.loads(text)["project"])))
