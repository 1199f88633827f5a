"""What a command leaves is on disk before it has its name: seen by strace, from outside."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT
from resuming import write_config
from sites import write_federation
from synced import unsynced

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def check(folder: Path, *arguments: str | Path, later: str = "") -> None:
    command = [sys.executable, "-m", "fedex_scale.cli", *map(str, arguments)]
    trace = folder.parent / "trace"
    assert unsynced(command, folder, trace, later=later, env=ENVIRONMENT) == []


def test_what_is_not_synced_is_seen(tmp_path: Path) -> None:
    program = (
        "import os, sys; new = sys.argv[1] + '/new'; os.mkdir(new); open(new + '/a', 'w').close(); "
        "os.fsync(os.open(new + '/b', os.O_CREAT | os.O_WRONLY)); "
        "os.rename(new, sys.argv[1] + '/old')"
    )
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", program, str(tmp_path / "place")]
    found = unsynced(command, tmp_path / "place", tmp_path / "trace")
    place = tmp_path / "place"
    assert sorted(found) == [
        f"{place} holds a new name",
        f"{place}/new holds a new name, then renamed to {place}/old",
        f"{place}/new/a written, then renamed to {place}/old",
    ]


def test_aggregate(tiny_llama: Path, tmp_path: Path, clients: list[Path]) -> None:
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "deep" / "out"
    fold = ["--fold", "round"]
    check(tmp_path / "place", "aggregate", "--base", tiny_llama, "--out", out, *fold, *clients)
    assert (out / "base").is_dir()


@pytest.fixture(scope="module")
def clients(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tiny import random_pairs, save_adapter

    from fedex_scale.files.basefiles import BaseFiles

    files, folder = BaseFiles(tiny_llama), tmp_path_factory.mktemp("clients")
    names = [name for name in files.names if name.endswith("q_proj.weight")]
    shapes = {name.removesuffix(".weight"): files.shape(name) for name in names}
    pairs = [random_pairs(shapes, rank=2, seed=k) for k in range(3)]
    return [save_adapter(folder / f"c{k}", x, alpha=4) for k, x in enumerate(pairs)]


@pytest.mark.slow
def test_a_run_and_what_is_made_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    data = {"fedex_word_problems": str(tmp_path / "heldout.jsonl")}
    evaluation = {"tasks": list(data), "data": data, "limit": 1}
    config = write_config(tiny_llama, tmp_path, evaluation=evaluation)
    place = tmp_path / "place"
    place.mkdir()
    check(place, "run", "--config", config, f"run.dir={place / 'runs'}", "federation.rounds=1")
    run = place / "runs" / "run"
    assert (run / "final" / "exact_adapter").is_dir()
    check(place, "report", run)
    check(place, "report", run, "--out", place / "report")
    check(place, "export", run, "--out", place / "exported")
    check(place, "export", run, "--merged", "--out", place / "merged")
    check(place, "evaluate", run, "--out", place / "scores")


@pytest.mark.slow
def test_rounds_between_sites(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write_federation(tiny_llama, tmp_path, federation={"rounds": 1})
    place = tmp_path / "place"
    place.mkdir()
    run, arrived = place / "run", place / "run" / "arrived" / "round-0001"
    check(place, "server-round", run, "--config", folder / "server.yaml")
    for k in range(3):
        site = ["--config", folder / f"site-{k}.yaml", "--server", run / "sent" / "round-0001"]
        check(place, "client-round", *site, "--out", arrived / f"site-{k}", f"run.dir={place}/s")
    check(place, "server-round", run, later="/clients/round-")  # which begins anew if it is killed
    assert (run / "final" / "adapter").is_dir()
