"""A fresh clone installs what is pinned, and tells in one line what the machine lacks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
DS_KEYS = {
    "aio",
    "bf16",
    "data_types",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
# Stand-ins for python3: each answers one of the Makefile's questions with no.
PYTHONS = {
    "old": 'case "$*" in --version) echo Python 3.8.2 ;; *) exit 1 ;; esac',
    "no venv": 'case "$*" in *ensurepip*) exit 1 ;; esac',
    "no headers": 'case "$*" in *Python.h*) exit 1 ;; esac',
    "complete": "exit 0",
}


LARGE_EXTRAS = ("nlg", "images")
"""Which `make install` leaves out: 100 MB of METEOR's data, and vision models."""


def test_every_declared_dependency_is_pinned_and_installed_as_pinned() -> None:
    pins = read_pins()
    for name in (requirement.name for requirement in declared_requirements(but=LARGE_EXTRAS)):
        assert version(name).partition("+")[0] == pins[canonicalize_name(name)], name


def test_every_declared_dependency_has_a_lower_bound_that_the_pin_meets_and_a_reason() -> None:
    pins = read_pins()
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for requirement in declared_requirements():
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier
        (line,) = [line for line in lines if line.startswith(f'    "{requirement}",')]
        assert line.partition("  # ")[2], line


def test_every_lower_bound_is_among_those_that_are_installed_together() -> None:
    script = [sys.executable, str(ROOT / "tests" / "lowest.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    printed = {Requirement(line).name: line for line in done.stdout.splitlines()}
    for requirement in declared_requirements(but=LARGE_EXTRAS):
        assert printed[requirement.name] == str(requirement).replace(">=", "==")


def test_torch_pin_fits_cpu_and_cuda_builds() -> None:
    assert read_pins()["torch"] == "2.13.0"


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", "Makefile", ".ci/run"])
def test_no_file_says_where_packages_come_from(name: str) -> None:
    assert not re.search("://|index-url|find-links", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("python", "compiler", "expected"),
    [
        (None, True, "Python: expected 3.10 or newer, got none; install one"),
        ("old", True, "Python: expected 3.10 or newer, got Python 3.8.2; install one"),
        ("no venv", True, "the venv module, got none; install it (apt-get install python3-venv)"),
        ("no headers", True, "got none; install them (apt-get install python3-dev)"),
        ("complete", False, "C++ compiler: expected c++ on PATH, got none; install one"),
    ],
)
def test_make_names_what_is_missing_on_one_line(
    tmp_path: Path, python: str | None, compiler: bool, expected: str
) -> None:
    done = make_install(tmp_path, python=python, compiler=compiler)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / ".venv").exists()


def test_make_names_only_files_that_exist() -> None:
    named = re.findall(r"launch/[\w/]+\.\w+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_config(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = json.loads(path.read_text(encoding="utf-8"))
    assert set(config) <= DS_KEYS
    zero = DeepSpeedConfig(fill_auto(config)).zero_config
    assert path.stem.startswith(f"zero{int(zero.stage)}")
    # A residual is written to shards; these would keep the forward pass from seeing it.
    assert zero.zero_hpz_partition_size == 1
    assert not zero.zero_quantized_weights
    assert not zero.zero_quantized_nontrainable_weights


@pytest.mark.parametrize(
    ("name", "num_processes"), [("cpu", 1), ("cpu2", 2), ("gpu", 1), ("gpu8_zero3", 8)]
)
def test_accelerate_accepts_every_config(name: str, num_processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == num_processes
    assert config.use_cpu == name.startswith("cpu")


def test_fetch_model_leaves_a_complete_directory_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    assert fetch_model(tmp_path).returncode == 0
    assert (tmp_path / "model.safetensors").stat().st_size == 0


def test_fetch_model_does_not_write_into_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    done = fetch_model(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out: expected")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def read_pins() -> dict[str, str]:
    """Return the pinned version of each package for the Python that runs."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        if pin.marker is None or pin.marker.evaluate():
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = specifier.version
    return pins


def declared_requirements(*, but: Sequence[str] = ()) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    chosen = [lines for name, lines in extras.items() if name not in but]
    return [Requirement(line) for line in sum(chosen, project["dependencies"])]


def make_install(
    directory: Path, *, python: str | None, compiler: bool
) -> subprocess.CompletedProcess[str]:
    """Run `make install` on a copy, with nothing on PATH but the stand-ins."""
    commands = {}
    if python is not None:
        commands["python3"] = PYTHONS[python]
    if compiler:
        commands["c++"] = "exit 0"
    path = directory / "bin"
    path.mkdir()
    for name, body in commands.items():
        (path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (path / name).chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, directory)
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "install"],
        cwd=directory,
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def fill_auto(node: dict) -> dict:
    """Fill in what a run would: one process, batch 2, no clipping."""
    values = {
        "buffer_size": 1_000_000,
        "enabled": False,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "nvme_path": "/nvme",
        "pin_memory": False,
        "train_micro_batch_size_per_gpu": 2,
    }
    return {
        key: fill_auto(value)
        if isinstance(value, dict)
        else values[key]
        if value == "auto"
        else value
        for key, value in node.items()
    }


def fetch_model(out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "fetch_model.py", "--out", out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
