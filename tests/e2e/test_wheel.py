"""What is built works from anywhere: installed by itself, in an empty directory, without the clone.

The libraries are those of the environment that runs the tests; this package is the wheel's. A hook
refuses to open anything of the clone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from rows import write_data
from tiny import near, random_pairs, save_adapter

from fedex_scale.data.word_problems import generate, write_jsonl

ROOT = Path(__file__).parents[2]
LIBRARIES = sysconfig.get_paths()["purelib"]
NO_CLONE = f"""\
import os, sys

clone, libraries = {f"{ROOT}/"!r}, {f"{sys.prefix}/"!r}

def refuse(event, arguments):
    if event not in ("open", "os.listdir", "os.scandir") or isinstance(arguments[0], int):
        return
    path = os.path.realpath(os.fsdecode(arguments[0] or "."))
    if path.startswith(clone) and not path.startswith(libraries):
        raise PermissionError(13, "the clone is out of bounds", path)

sys.addaudithook(refuse)
"""
SHAPES = {"model.layers.0.mlp.up_proj": (112, 48), "model.layers.1.self_attn.v_proj": (32, 48)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist and the wheel, and return their directory."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def fedex_scale(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, and return its command."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([sys.executable, *install, wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{LIBRARIES}\n", encoding="utf-8")
    (packages / "sitecustomize.py").write_text(NO_CLONE, encoding="utf-8")
    return folder / "bin" / "fedex-scale"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_a_wheel_from_the_sdist_has_the_same_files(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", sdist, "-C", tmp_path], check=True)
    (unpacked,) = tmp_path.iterdir()
    build(unpacked, tmp_path / "again", "-t", "wheel")
    (first,), (second,) = built.glob("*.whl"), (tmp_path / "again").glob("*.whl")
    assert contents(first) == contents(second)


def test_the_wheel_carries_what_comes_along_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    files = contents(wheel)
    places = {
        "fedex_scale/": [ROOT / "fedex_scale"],
        "fedex_scale/share/tasks/": [ROOT / "eval" / "tasks"],
        "fedex_scale/share/ds_configs/": list((ROOT / "ds_configs").glob("*.json")),
        "fedex_scale/share/recipes/": list((ROOT / "launch").glob("*.yaml")),
    }
    expected = {
        place + str(file.relative_to(start if start.is_dir() else start.parent)): file.read_bytes()
        for place, starts in places.items()
        for start in starts
        for file in (start.rglob("*") if start.is_dir() else [start])
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name: data for name, data in files.items() if ".dist-info/" not in name} == expected


def test_the_clone_is_out_of_bounds(fedex_scale: Path, empty: Path) -> None:
    program = f"import fedex_scale; print(fedex_scale.__file__); open({str(ROOT / 'README.md')!r})"
    done = start([fedex_scale.parent / "python", "-c", program], empty)
    assert Path(done.stdout.strip()).is_relative_to(fedex_scale.parents[1])
    assert "the clone is out of bounds" in done.stderr


def test_recipes_are_listed_and_copied(fedex_scale: Path, empty: Path) -> None:
    listed = done(fedex_scale, empty, "recipes").splitlines()
    assert [line for line in listed if not line.startswith(" ")] == [
        file.stem for file in sorted((ROOT / "launch").glob("*.yaml"))
    ]
    assert done(fedex_scale, empty, "recipes", "quickstart", "--out", ".") == "quickstart.yaml\n"
    first = (empty / "quickstart.yaml").read_text(encoding="utf-8").splitlines()[0]
    schema = Path(first.partition("$schema=file://")[2])
    assert schema.is_relative_to(fedex_scale.parents[1])
    assert json.loads(schema.read_text(encoding="utf-8"))["title"]
    assert "no mistake in its settings" in done(
        fedex_scale, empty, "config", "--check", "quickstart.yaml"
    )


def test_a_recipe_is_planned_by_its_name(fedex_scale: Path, empty: Path) -> None:
    """Its model and data need not be there, and its DeepSpeed file comes along."""
    told = done(fedex_scale, empty, "plan", "--config", "quickstart")
    assert told.startswith("models/SmolLM2-135M-Instruct: 0.13 billion weights")
    assert "\nzero2, GB" in told
    assert told.endswith("\nfits\n")


def test_adapters_are_aggregated(fedex_scale: Path, empty: Path, tiny_llama: Path) -> None:
    pairs = random_pairs(SHAPES, rank=2, seed=0)
    clients = [
        save_adapter(empty / f"client{k}", near(pairs, spread=0.5, seed=k), alpha=4) for k in (1, 2)
    ]
    told = done(fedex_scale, empty, "aggregate", "--base", tiny_llama, "--out", "merged", *clients)
    assert "kept 100.0000%" in told
    assert (empty / "merged" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_is_trained_under_zero2_and_scored(
    fedex_scale: Path, empty: Path, tiny_llama: Path
) -> None:
    write_jsonl(generate(0, train=12, heldout=2)[0], empty / "train.jsonl")
    write_data(empty / "data")
    config = {
        "run": {"name": "tiny"},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "lora": {"rank": 2},
        "data": {"path": "train.jsonl"},
        "partition": {"num_clients": 2},
        "train": {"batch_size": 3, "micro_batch_size": 3},
        "engine": {"deepspeed": "zero2"},
    }
    (empty / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert "float32, zero2, 1 x cpu" in done(fedex_scale, empty, "run", "--config", "tiny.yaml")
    scored = ["evaluate", "runs/tiny", "--suite", "fedex_gsm8k", "--limit", "1"]
    assert "fedex_gsm8k/exact_match" in done(fedex_scale, empty, *scored)


def build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-d", out, *options]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def start(command: list, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FEDEX_"))}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )


def done(program: Path, folder: Path, *arguments: object) -> str:
    """Run a command that succeeds, and return what it prints."""
    run = start([program, *arguments], folder)
    assert run.returncode == 0, run.stderr
    return run.stdout
