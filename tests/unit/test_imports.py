"""The package's modules import downwards only, and what is heavy stays where it belongs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fedex_scale"
ERRORS = "fedex_scale.runtime.errors"
DOOR = "fedex_scale.runtime.door"

# From top to bottom: a room may import what stands below it, and nothing of `fedex_scale` itself.
ROOMS = (
    "cli",
    "api",
    "sites",
    "flower",
    "run",
    "afterwards",
    "planning",
    "rounds",
    "federation",
    "scoring",
    "reporting",
    "engine",
    "aggregation",
    "files",
    "tasks",
    "data",
    "methods",
    "config",
    "runtime",
)
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}


def test_every_module_has_its_room() -> None:
    assert {room(file) for file in FILES} - {"__init__"} == set(ROOMS)


def test_a_room_says_what_it_is_for_and_imports_nothing() -> None:
    for file in PACKAGE.glob("*/__init__.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) == 1, file
        assert lines[0].startswith('"""'), file
        assert not (file.parent / f"{file.parent.name}.py").exists(), "one name for two things"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = room(file)
    for module in imported(file):
        package, *rest = module.split(".")
        if package == "fedex_scale" and rest and rest[0] != own:
            if own == "__init__":  # what it re-exports, once it is asked for
                assert rest[0] == "api", f"fedex_scale imports {module}"
            else:
                assert ROOMS.index(own) < ROOMS.index(rest[0]), f"{own} imports {module}"


def test_no_circle_within_a_room() -> None:
    known = set(MODULES.values())
    graph = {
        name: {module for module in imported(file) if module in known and module != name}
        for file, name in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_few_modules_import_deepspeed() -> None:
    importers = {
        MODULES[file] for file in FILES for name in imported(file) if is_in("deepspeed", name)
    }
    allowed = {f"fedex_scale.engine.{name}" for name in ("build", "ops", "parameters")}
    assert importers <= allowed


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("methods", ("torch", "fedex_scale.methods", "fedex_scale.config", ERRORS)),
        ("config", ("pydantic", "yaml", "fedex_scale.config", ERRORS, DOOR)),
        ("flower", ("flwr", "fedex_scale.flower")),
    ],
)
def test_rooms_that_know_little(own: str, others: tuple[str, ...]) -> None:
    allowed = {*others, *sys.stdlib_module_names}
    for file in FILES:
        if room(file) == own:
            for module in imported(file):
                assert any(is_in(name, module) for name in allowed), f"{file.name}: {module}"


def test_rounds_is_short_enough_to_be_read() -> None:
    assert len((PACKAGE / "rounds.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_a_run_without_deepspeed_does_not_import_it(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"query": f"Tom has {i} apples.", "response": f"The answer is: {i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "run": {"dir": str(tmp_path / "runs")},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "partition": {"num_clients": 2},
        "lora": {"rank": 2},
        "train": {"batch_size": 1, "local_epochs": 2},
        "aggregate": {"fold": "round"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    program = (
        "import sys; from fedex_scale.run import run_config; "
        f"assert 'deepspeed' not in sys.modules; run_config({str(tmp_path / 'run.yaml')!r}, []); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "run" / "final" / "base" / "config.json").is_file()


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_in(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(file: Path) -> Iterator[str]:
    """Yield the full name of what a file imports, within functions as well.

    Within the app for Flower, which travels under a name of its own, imports are relative.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or room(file) == "flower", f"{file.name}: relative import"
            module = f"fedex_scale.flower.{node.module}" if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)
