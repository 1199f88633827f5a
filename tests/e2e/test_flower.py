"""Real SuperLinks and SuperNodes on loopback, with TLS and keys; `make flower` brings them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from resuming import files
from sites import write_federation

from fedex_scale.run import run_config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "launch"))
from federation import Loopback  # noqa: E402

FLOWER = Path(os.environ.get("FEDEX_SCALE_FLOWER") or ROOT / ".flower" / "bin")
PROGRAM = f"{sys.executable} -m fedex_scale.cli"
WAIT_S = 900

pytestmark = pytest.mark.skipif(
    not (FLOWER / "flower-superlink").exists(),
    reason=f"no Flower in {FLOWER}; make flower, or set FEDEX_SCALE_FLOWER to its bin",
)


@pytest.fixture(autouse=True)
def path_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start_all(sites: Loopback, folder: Path, count: int) -> None:
    sites.start_superlink()
    for k in range(count):
        sites.register(k)
        sites.start_supernode(k, folder / f"site-{k}.yaml")
    sites.start_run()


def assert_equal(simulated: Path, run: Path) -> None:
    for part in ("server", "clients", "final"):
        mine, theirs = files(run / part), files(simulated / part)
        theirs.pop("README.md", None)
        assert mine == theirs, part


def test_sites_that_are_late_fail_or_send_what_they_should_not(tmp_path: Path) -> None:
    checks = Path(__file__).with_name("flower_checks.py")
    command = [FLOWER / "python", checks, ROOT / "fedex_scale", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_round_over_tls_is_the_simulations(tiny_llama: Path, tmp_path: Path) -> None:
    """Two sites that the server knows, and a third that it does not: it gets nothing."""
    folder = write_federation(tiny_llama, tmp_path, num_sites=2, federation={"rounds": 1})
    run_config(folder / "simulation.yaml", [])
    with Loopback(folder / "loopback", folder / "server.yaml", FLOWER, PROGRAM) as sites:
        start_all(sites, folder, 2)
        sites.start_supernode(2, folder / "site-0.yaml")  # its key is not registered
        assert sites.wait(WAIT_S), sites.log("run") + sites.log("superlink")[-3000:]
        stranger = sites.log("site-2")
        told = sites.log("run")
    assert_equal(folder / "simulation", sites.run)
    assert told.count("asked node") == 2
    assert "'site-0'" in told  # what it was registered by, which binds it to its number
    assert "Received" not in stranger
    assert len(json.loads((sites.run / "nodes.json").read_text())) == 2


KILLS, MOMENTS = ("supernode", "serverapp", "superlink", "rank"), 10


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("victim", KILLS)
def test_whatever_is_killed_the_federation_goes_on(
    victim: str, moment: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """At a seeded moment; what ended is started again, as a service manager would."""
    folder = write_federation(tiny_llama, tmp_path)
    run_config(folder / "simulation.yaml", [])
    draw = random.Random(f"flower {victim} {moment}")
    with Loopback(folder / "loopback", folder / "server.yaml", FLOWER, PROGRAM) as sites:
        start_all(sites, folder, 3)
        wait_for(lambda: "asked node" in sites.log("run"))
        time.sleep(draw.uniform(0, 20))
        kill(sites, victim)
        revive(sites, folder, victim)
        assert finish(sites), sites.log("run")[-3000:]
    assert_equal(folder / "simulation", sites.run)
    wait_for(lambda: not list(processes("", sites.folder)), 60)  # no orphan


def kill(sites: Loopback, victim: str) -> None:
    if victim in ("superlink", "supernode"):
        sites.end("superlink" if victim == "superlink" else "site-1", signal.SIGKILL)
        return
    word = "flwr-serverapp" if victim == "serverapp" else "client-round"
    wait_for(lambda: list(processes(word, sites.folder)))
    os.kill(next(processes(word, sites.folder)), signal.SIGKILL)


def revive(sites: Loopback, folder: Path, victim: str) -> None:
    if victim == "superlink":
        sites.start_superlink()
    if victim == "supernode":
        time.sleep(60)  # Flower takes a minute to see that a node is gone
        sites.start_supernode(1, folder / "site-1.yaml")


def finish(sites: Loopback) -> bool:
    """Wait for the end, and start Flower's run again where it ended before."""
    for _ in range(4):
        if sites.wait(WAIT_S):
            return True
        if sites.processes["run"].poll() is None:
            sites.end("run", signal.SIGTERM)
        sites.start_run()
    return False


def wait_for(condition, seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


def processes(word: str, folder: Path) -> Iterator[int]:
    """Yield the processes of a federation whose command line has a word."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, around = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if word.encode() in line and str(folder).encode() in line + around:
            yield int(path.name)
