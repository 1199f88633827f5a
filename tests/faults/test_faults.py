"""Signals, failing clients, full disks and full memory: one line each, and a run that can go on."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resuming import assert_same_result, events, write_config

from fedex_scale.cli import main
from fedex_scale.federation import checkpoint, client, saves
from fedex_scale.federation.history import History
from fedex_scale.files import tensorfile
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import faults


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tiny_llama, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(config: Path) -> RunDir:
    """A run that nothing happened to."""
    run = start(config, "whole")
    assert run.code == 0
    return run


class Started(RunDir):
    code = 0


def start(config: Path, name: str, *arguments: str) -> Started:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(config), f"run.name={name}", *arguments])
    run = Started(config.parent / "runs" / name)
    object.__setattr__(run, "code", ended.value.code)
    return run


def at_call(module: object, name: str, count: int, action: Callable[[], None]) -> Callable:
    """Return a stand-in for a function that does something first at its n-th call."""
    real, calls = getattr(module, name), [0]

    def called(*args, **options):
        calls[0] += 1
        if calls[0] == count:
            action()
        return real(*args, **options)

    return called


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that the user was told."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [x for x in lines if x.startswith(("error: ", "stopped by "))]
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("module", "function", "count"),
    [(client, "train_step", 5), (checkpoint, "entry_of", 40), (saves, "write_adapter", 2)],
)
def test_signals(
    number: int,
    module: object,
    function: str,
    count: int,
    config: Path,
    whole: RunDir,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"{function}-{number.name}"
    with monkeypatch.context() as patch:
        call = at_call(module, function, count, lambda: os.kill(os.getpid(), number))
        patch.setattr(module, function, call)
        run = start(config, name)
    assert run.code == 128 + number
    told = error_of(capsys)
    assert told.startswith(f"stopped by {number.name} ")
    assert told.endswith("the same command with --resume goes on")
    if function == "train_step":
        assert "in round 1, client 1, after step 2" in told
        assert events(run.path)[-1]["step"] == 2, "the step was finished"
    assert start(config, name, "--resume").code == 0
    assert_same_result(whole.path, run.path)


def nan_client(
    function: str, monkeypatch: pytest.MonkeyPatch, only: int, *, times: int = 99, since: int = 1
) -> None:
    """Let client `only` fail, by its loss or the adapter that it ends with, from a round on."""
    real, begun = getattr(client, function), saves.ClientProgress
    current, left, rounds = [None], [times], [0]

    def fails() -> bool:
        if current[0] != only or left[0] == 0 or rounds[0] < since:
            return False
        left[0] -= 1
        return True

    def train_step(engine, batches, **options):
        loss = real(engine, batches, **options)
        return math.nan if fails() else loss

    def read_pairs(engine, **options):
        for layer, pair in real(engine, **options):
            if fails():
                pair.B_OR[0, 0] = math.inf
            yield layer, pair

    def progress(**fields):
        current[0] = fields["client"]
        rounds[0] += current[0] == only
        return begun(**fields)

    monkeypatch.setattr(saves, "ClientProgress", progress)
    monkeypatch.setattr(client, function, locals()[function])


@pytest.mark.parametrize("function", ["train_step", "read_pairs"])
def test_a_failed_client_is_skipped_and_the_others_share_its_weight(
    function: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_client(function, monkeypatch, only=1)
    run = start(config, f"skip-{function}", "federation.on_client_failure=skip")
    assert run.code == 0
    failures = [x for x in events(run.path) if x["event"] == "failure"]
    assert [(x["round"], x["client"], x["action"]) for x in failures] == [
        (1, 1, "skip"),
        (2, 1, "skip"),
    ]
    report = json.loads((run.server(2) / "aggregate.json").read_text())
    assert (report["clients"], report["weights"], report["skipped"]) == ([0, 2], [0.5, 0.5], [1])


def test_a_failed_client_stops_the_run_or_is_trained_again(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        nan_client("train_step", patch, only=2)
        assert start(config, "nan").code == 2
        assert "round 1, client 2, step 1: expected a finite loss" in error_of(capsys)
        assert start(config, "nan", "federation.on_client_failure=retry", "--resume").code == 2
    with monkeypatch.context() as patch:
        nan_client("train_step", patch, only=2, times=1)
        run = start(config, "nan", "federation.on_client_failure=retry", "--resume")
    assert run.code == 0
    steps = [x for x in events(run.path) if x["event"] == "step"]
    assert len(steps) == 18
    assert not any(json.loads((run.server(1) / "aggregate.json").read_text())["skipped"])


def test_one_client_left_keeps_the_side_adapter(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_client("train_step", monkeypatch, only=1, since=2)
    options = ["federation.on_client_failure=skip", "partition.num_clients=2"]
    run = start(config, "one", *options)
    assert run.code == 0
    first, second = (History(run, round) for round in (1, 2))
    for layer in Adapter(run.side(1)).layers:
        for mine, theirs in zip(first.side(layer), second.side(layer), strict=True):
            assert mine.equal(theirs)


def test_the_next_client_does_not_wait_for_a_slow_disk(
    config: Path, whole: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_client, train_step = saves.write_client, client.train_step
    steps, steps_when_written, goes_on = [0], {}, threading.Event()

    def write_slowly(engine, update, *rest) -> None:
        if (update.round, update.client) == (1, 0):
            assert goes_on.wait(60), "expected the second client to train meanwhile"
        write_client(engine, update, *rest)
        steps_when_written[update.round, update.client] = steps[0]

    def step(*args, **options) -> float:
        steps[0] += 1
        if steps[0] == 5:  # the second client's second
            goes_on.set()
        return train_step(*args, **options)

    monkeypatch.setattr(saves, "write_client", write_slowly)
    monkeypatch.setattr(client, "train_step", step)
    run = start(config, "slow-disk")
    assert run.code == 0
    assert steps_when_written[1, 0] == 5
    assert steps_when_written[1, 2] == 9  # the round is over: it is waited for
    assert_same_result(whole.path, run.path)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("server/round-0000/adapter", 3),
        ("round-0001/client-0000", 1),
        ("round-0001/client-0002", 2),
        ("checkpoints", 20),
        ("round-0001/residual", 9),
        ("round-0002/client-0001", 2),
        ("final/exact_adapter", 5),
    ],
)
def test_a_full_disk_in_the_middle_of_a_write(
    file: str,
    count: int,
    config: Path,
    whole: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = tensorfile._write_all, [0]

    def write_all(opened, *data: memoryview) -> None:
        calls[0] += file in str(opened.name)
        if calls[0] == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
        real(opened, *data)

    name = f"full-{file.replace('/', '-')}"
    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "_write_all", write_all)
        run = start(config, name)
    assert run.code in (1, 2)
    assert "the disk is full; free some space, and the same command" in error_of(capsys)
    assert start(config, name, "--resume").code == 0
    assert_same_result(whole.path, run.path)


def test_a_full_disk_is_seen_before_a_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = saves.shutil.disk_usage("/")
    monkeypatch.setattr(saves.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert start(config, "no-room").code == 2
    assert "of room, got 0.0 MB; free some space" in error_of(capsys)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_what_to_change(
    error: Exception,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(client, "train_step", at_call(client, "train_step", 2, fail))
    assert start(config, f"memory{id(error)}").code == 1
    told = error_of(capsys)
    for setting in ("train.micro_batch_size", "model.gradient_checkpointing", "engine.deepspeed"):
        assert setting in told


def test_a_peer_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    monkeypatch.setattr(faults._Peers, "ids", {1: child, 2: os.getppid()})
    told = faults.explain(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert told.startswith(f"rank 1 (process {child}) ended before its time")
    os.waitpid(child, 0)
    assert faults.dead_peer() == told.replace("\n", "")


def test_a_rejected_client_is_recorded(config: Path) -> None:
    def report_of(name: str, bound: float) -> dict:
        run = start(config, name, f"aggregate.reject_update_norm={bound}", "federation.rounds=1")
        assert run.code == 0
        return json.loads((run.server(1) / "aggregate.json").read_text())

    norms = report_of("norms", 1e9)["update_norms"]
    report = report_of("rejected", sorted(norms)[1])
    assert report["rejected"] == [norms.index(max(norms))]
    assert sum(report["weights"]) == pytest.approx(1)
