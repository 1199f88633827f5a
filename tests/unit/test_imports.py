"""The package's modules import downwards only, and what is heavy stays where it belongs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fedex_scale"

# Each module, or folder of modules, may import what stands below it.
ORDER = (
    "cli",
    "api",
    "offline",
    "job",
    "reporting",
    "compare",
    "scoring",
    "run",
    "plan_table",
    "planning",
    "plan",
    "footprint",
    "doctor",
    "machine",
    "rounds",
    "saves",
    "export",
    "server",
    "client",
    "screening",
    "card",
    "record",
    "communication",
    "aggregator",
    "deviation",
    "aggregate_report",
    "history",
    "evaluation",
    "stock_tasks",
    "spread",
    "progress",
    "snapshot",
    "engine",
    "ds_config",
    "loading",
    "lora_model",
    "head",
    "models",
    "adapters",
    "peft_config",
    "data",
    "parameters",
    "weights",
    "side",
    "methods",
    "algebra",
    "lowrank",
    "basefiles",
    "conversion",
    "tensorfile",
    "checkpoint",
    "outputs",
    "config",
    "faults",
    "phases",
    "distributed",
    "state",
    "errors",
)
PURE = ("methods", "algebra", "lowrank")
FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_place() -> None:
    assert {level(file) for file in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = level(file)
    for module in imported(file):
        package, *rest = module.split(".")
        if package == "fedex_scale" and rest and rest[0] != own:
            if own == "__init__":
                assert rest[0] == "api", f"fedex_scale imports {module}"
            else:
                assert ORDER.index(own) < ORDER.index(rest[0]), f"{own} imports {module}"


def test_few_modules_import_deepspeed() -> None:
    importers = {
        level(file) for file in FILES for name in imported(file) if is_in("deepspeed", name)
    }
    assert importers <= {"engine", "parameters", "weights"}


def test_methods_know_torch_and_their_settings_and_nothing_else() -> None:
    own = (f"fedex_scale.{m}" for m in (*PURE, "config", "errors"))
    allowed = {"torch", *sys.stdlib_module_names, *own}
    for file in FILES:
        if level(file) in PURE:
            for module in imported(file):
                assert any(is_in(name, module) for name in allowed), f"{file.name}: {module}"


def test_settings_know_errors_and_nothing_else() -> None:
    own = ("fedex_scale.config", "fedex_scale.errors")
    allowed = {"pydantic", "yaml", *sys.stdlib_module_names, *own}
    for file in FILES:
        if level(file) == "config":
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


def level(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_in(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(file: Path) -> Iterator[str]:
    """Yield the full name of what a file imports, within functions as well."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
