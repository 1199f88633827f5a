"""A federation of directories does what the simulation does, to the bit, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from resuming import files
from sites import NUM_SITES, write_federation

from fedex_scale.federation.saves import Saver
from fedex_scale.federation.state import Place
from fedex_scale.files.adapters import WEIGHTS_FILE, Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting.page import write_report
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError
from fedex_scale.sites import server_round as rounds_of_server
from fedex_scale.sites.client_round import _prune, client_round
from fedex_scale.sites.server_round import server_round

CASES = {
    "full": ["aggregate.side_rank=3"],
    "per_client": ["federation.init=per_client", "lora.dropout=0.1"],
    "ffa": ["method.name=ffa", "federation.max_examples=9"],
    "flora": ["method.name=flora", "federation.fixed_examples=[3,2,1]"],
    "held out": ["data.holdout=0.2"],
}


class Interrupted(Exception):
    """Stands for kill -9: nothing is cleaned up."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tiny_llama, tmp_path_factory.mktemp("sites"))


def begin(folder: Path, name: str, *options: str) -> Path:
    run = folder / name
    server_round(run, folder / "server.yaml", options, say=lambda line: None)
    return run


def train(folder: Path, run: Path, number: int, site: int, *options: str) -> Path:
    """Let a site train for a round, and put what it sends where the server looks for it."""
    out = run / "arrived" / f"round-{number:04d}" / f"from-{site}"
    options = (*options, f"run.dir={folder / 'sites' / run.name}")
    sent = run / "sent" / f"round-{number:04d}"
    client_round(folder / f"site-{site}.yaml", options, server_dir=sent, out=out)
    return out


def advance(folder: Path, run: Path, number: int, *options: str, sites: Sequence[int] = ()) -> None:
    for site in sites or range(NUM_SITES):
        train(folder, run, number, site, *options)
    server_round(run, say=lambda line: None)


def told(run: Path, number: int) -> dict:
    return json.loads((run / "server" / f"round-{number:04d}" / "aggregate.json").read_text())


def same(one: Path, other: Path) -> bool:
    cards = {"README.md"}
    return all(
        {k: v for k, v in files(one / part).items() if k not in cards}
        == {k: v for k, v in files(other / part).items() if k not in cards}
        for part in ("server", "clients", "final")
    )


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_simulation(case: str, folder: Path) -> None:
    options = CASES[case]
    run_config(folder / "simulation.yaml", [f"run.name={case}-simulated", *options])
    run = begin(folder, case, *options)
    for number in (1, 2):
        advance(folder, run, number, *[x for x in options if "fixed" not in x])
        if case == "held out":
            (lines, *_) = (folder / "sites" / run.name).rglob(f"round-{number:04d}-*/metrics.jsonl")
            told_at_site = [json.loads(x) for x in lines.read_text().splitlines()]
            (loss,) = [x["loss"] for x in told_at_site if x["event"] == "held_out"]
            assert loss > 0
    assert (run / "final" / "adapter").is_dir()
    assert same(folder / f"{case}-simulated", run)
    if case == "full":  # what had no room is kept by the server, and offered again
        assert told(run, 2)["kept_of_all"] < 1
        assert (run / "server" / "round-0001" / "residual").is_dir()
        used_afterwards(run)
    if case == "flora":
        assert told(run, 1)["weights"] == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    if case == "ffa":
        assert told(run, 1)["weights"] == pytest.approx([8 / 26, 9 / 26, 9 / 26])


def used_afterwards(run: Path) -> None:
    """Do with a federation's run, which knows no site's rows, what one does with any other."""
    commands = {
        "report": ("report", run, "--out", run.with_name("page")),
        "export": ("export", run, "--out", run.with_name("exported")),
        "merged": ("export", run, "--out", run.with_name("merged"), "--merged"),
        "chat": ("chat", run, "--max-new-tokens", "4"),
    }
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", "fedex_scale.cli", *map(str, command)],
            input="Hello\n",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (name, done.stderr)
        assert "Traceback" not in done.stderr, (name, done.stderr)
    assert "client 2" in (run.with_name("page") / "report.html").read_text(encoding="utf-8")


def test_a_finished_round_is_handed_over_again_without_training(folder: Path, capsys) -> None:
    run = begin(folder, "twice")
    first = train(folder, run, 1, 0)
    kept = files(first) | {"client.json": (first / "client.json").read_bytes()}
    shutil.rmtree(first)
    capsys.readouterr()
    again = train(folder, run, 1, 0)
    assert files(again) | {"client.json": (again / "client.json").read_bytes()} == kept
    assert "handing it over again" in capsys.readouterr().out
    shutil.rmtree(again)
    other = train(folder, run, 1, 0, "run.seed=1")  # another start
    assert files(other) != {k: v for k, v in kept.items() if k != "client.json"}


def test_bfloat16_on_the_way_halves_what_is_sent(folder: Path) -> None:
    run = begin(folder, "halved")
    whole = train(folder, run, 1, 0)
    sizes, pairs = (whole / WEIGHTS_FILE).stat().st_size, dict_of(Adapter(whole))
    shutil.rmtree(whole)
    half = train(folder, run, 1, 0, "site.send=bfloat16")  # of the same training
    assert (half / WEIGHTS_FILE).stat().st_size < 0.6 * sizes
    advance(folder, run, 1, sites=(1,))
    taken = dict_of(Adapter(run / "clients" / "round-0001" / "client-0000"))
    for layer, pair in pairs.items():
        for exact, rounded in zip(pair, taken[layer], strict=True):
            assert rounded.equal(exact.bfloat16().float())


def test_a_site_keeps_as_many_rounds_as_it_was_told(folder: Path) -> None:
    kept = RunDir(folder / "keeping")
    for k in range(5):
        (kept.path / f"round-{k}").mkdir(parents=True)
        os.utime(kept.path / f"round-{k}", (k, k))
    for keep, left in ((7, 5), (5, 5), (3, 3), (1, 1)):
        _prune(kept.path, RunDir(kept.path / "round-4"), keep)
        assert sorted(x.name for x in kept.path.iterdir()) == [
            f"round-{k}" for k in range(5 - left, 5)
        ]


def dict_of(adapter: Adapter) -> dict:
    return {layer: adapter.pair(layer) for layer in adapter.layers}


def test_a_client_killed_anywhere_goes_on(folder: Path, monkeypatch) -> None:
    run = begin(folder, "killed")
    expected, starts = files(train(folder, run, 1, 1)), 0
    shutil.rmtree(run / "arrived")
    shutil.rmtree(folder / "sites" / "killed")
    real = Saver._publish

    def publish(saver: Saver, scratch: Path, number: int, place: Place, length: int):
        done = real(saver, scratch, number, place, length)
        if not place.done:
            raise Interrupted
        return done

    while not (run / "arrived").exists():
        with monkeypatch.context() as patch, suppress(Interrupted):
            patch.setattr(Saver, "_publish", publish)
            out = train(folder, run, 1, 1)
        starts += 1
    assert starts > 2
    assert files(out) == expected


def test_a_server_killed_before_it_sends_does_the_round_again(folder: Path, monkeypatch) -> None:
    whole, parts = begin(folder, "whole"), begin(folder, "parts")
    advance(folder, whole, 1)
    for name in ("_send", "_log", "write_sent"):
        with monkeypatch.context() as patch, suppress(Interrupted):

            def die(*arguments: object) -> None:
                raise Interrupted

            patch.setattr(rounds_of_server, name, die)
            if name == "_send":
                advance(folder, parts, 1)
            else:
                server_round(parts, say=lambda line: None)
        assert not (parts / "sent" / "round-0002").exists()
    server_round(parts, say=lambda line: None)
    assert same(whole, parts)
    assert files(whole / "sent") == files(parts / "sent")
    events = [json.loads(x) for x in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [x["event"] for x in events] == ["client"] * NUM_SITES + ["round"]


def test_a_site_that_missed_a_round_needs_no_catching_up(folder: Path) -> None:
    """Its state is all in what it is sent: it trains the same as in a fresh directory."""
    run = begin(folder, "missed")
    advance(folder, run, 1, sites=(0, 1))
    assert told(run, 1)["skipped"] == [2]
    assert told(run, 1)["weights"] == pytest.approx([8 / 19, 11 / 19])
    out = train(folder, run, 2, 2)
    shutil.rmtree(folder / "sites")
    shutil.copytree(out, folder / "kept")
    shutil.rmtree(out)
    assert files(train(folder, run, 2, 2)) == files(folder / "kept")


def test_a_refused_result_is_asked_for_again(folder: Path) -> None:
    run = begin(folder, "again", "federation.min_clients=3")
    for site in range(NUM_SITES):
        train(folder, run, 1, site)
    arrived = run / "arrived" / "round-0001"
    (arrived / "from-1" / WEIGHTS_FILE).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"federation\.min_clients: expected 3 clients, got 2"):
        server_round(run, say=lambda line: None)
    assert not (arrived / "from-1").exists(), "its place is free"
    assert (arrived / ".refused-from-1" / WEIGHTS_FILE).read_bytes() == b"torn"
    train(folder, run, 1, 1)
    server_round(run, say=lambda line: None)
    assert told(run, 1)["clients"] == [0, 1, 2]


def test_a_refused_result_stands_in_the_report_and_a_late_one_is_named(folder: Path) -> None:
    run, said = begin(folder, "torn"), []
    for site in range(NUM_SITES):
        train(folder, run, 1, site)
    arrived = run / "arrived" / "round-0001"
    shutil.copytree(arrived / "from-0", folder / "late")
    (arrived / "from-1" / WEIGHTS_FILE).write_bytes(b"torn")
    server_round(run, say=said.append)
    page = write_report([run], folder / "page-of-torn").read_text(encoding="utf-8")
    assert "from-1" in page
    shutil.copytree(folder / "late", arrived / "from-0")
    with pytest.raises(UserError, match="min_clients"):
        server_round(run, say=said.append)
    assert any("this round is not open" in line and "from-0" in line for line in said)
    with pytest.raises(UserError, match="settings are for a federation's beginning"):
        server_round(run, None, ["lora.rank=2"], say=said.append)
    begin(folder, "many", "federation.rounds=100000")


def test_a_site_may_say_what_the_server_does_with_outliers(folder: Path) -> None:
    run = begin(folder, "robust", "aggregate.robust=trimmed")
    for site in range(NUM_SITES):
        train(folder, run, 1, site, "aggregate.robust=trimmed")
    server_round(run, say=lambda line: None)
    assert told(run, 1)["clients"] == [0, 1, 2]


def test_too_few_sites_change_nothing(folder: Path) -> None:
    run = begin(folder, "few", "federation.min_clients=2")
    train(folder, run, 1, 0)
    with pytest.raises(UserError, match="expected 2 clients, got 1"):
        server_round(run)
    assert not (run / "sent" / "round-0002").exists()
    train(folder, run, 1, 2)
    server_round(run)
    assert told(run, 1)["clients"] == [0, 2]


def test_a_site_with_a_rank_of_its_own_starts_from_all_that_the_server_has(folder: Path) -> None:
    run = begin(folder, "ranks")
    own = ("lora.rank=2", "lora.alpha=1")
    train(folder, run, 1, 0, *own)
    advance(folder, run, 1, sites=(1, 2))
    train(folder, run, 2, 0, *own)
    server = Adapter(run / "server" / "round-0001" / "adapter")
    before = Adapter(run / "sent" / "round-0002" / "side")
    (work,) = (folder / "sites" / "ranks" / "site-0").glob("round-0002-*")
    adapter, side = (Adapter(work / "server" / "round-0001" / x) for x in ("adapter", "side"))
    assert adapter.rank == 2
    for layer in server.layers:
        assert side.rank_of(layer) == before.rank_of(layer) + 2
        expected = product(server, layer) + product(before, layer)
        got = product(adapter, layer) + product(side, layer)
        assert (got - expected).norm() < 1e-6 * expected.norm()
    advance(folder, run, 2, sites=(1, 2))
    client = Adapter(run / "clients" / "round-0002" / "client-0000")
    assert client.rank == server.rank
    for layer in server.layers:  # what it did not train came back untouched
        assert client.pair(layer).A_RI[2:].equal(server.pair(layer).A_RI[2:])
        assert client.pair(layer).B_OR[:, 2:].equal(server.pair(layer).B_OR[:, 2:])


def product(adapter: Adapter, layer: str):
    pair = adapter.pair(layer).double()
    return adapter.scaling_of(layer) * pair.B_OR @ pair.A_RI
