"""A run that is interrupted anywhere and goes on ends as if it had never been interrupted."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from heads import write_head_config
from resuming import assert_same_result, differing, events, write_config

from fedex_scale.federation import checkpoint
from fedex_scale.federation.saves import Saver
from fedex_scale.federation.state import Place
from fedex_scale.files.run_dir import RunDir
from fedex_scale.planning import room
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError

CASES = {
    "side": ["lora.dropout=0.1", "aggregate.robust=clip"],
    "carry": ["aggregate.fold=carry", "model.dtype=bfloat16", "aggregate.robust=trimmed"],
    "planes": ["aggregate.fold=planes", "model.dtype=bfloat16"],
    "round": ["aggregate.fold=round", "model.dtype=bfloat16", "federation.init=per_client"],
    "overflow": ["aggregate.side_rank=2", "model.dtype=bfloat16", "federation.client_fraction=0.7"],
    "tokens": ["train.micro_batch_size=1", "train.micro_batch_tokens=auto"],
    "flora": ["method.name=flora", "aggregate.fold=carry"],
    "ffa": ["method.name=ffa"],
    "held_out": ["data.holdout=0.2", "lora.dropout=0.1", "evaluation.every_rounds=1"],
}


class Interrupted(Exception):
    """Stands for kill -9: nothing is cleaned up."""


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tiny_llama, tmp_path_factory.mktemp("resume"))


def directory(config: Path, name: str) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"]["dir"]) / name


def run(config: Path, name: str, *overrides: str, resume: bool = False) -> RunDir:
    mode = ["run.resume=auto"] if resume else []
    run_config(config, [f"run.name={name}", *overrides, *mode])
    return RunDir(directory(config, name))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let the next run end after so many checkpoints, with rubbish where it was at work."""
    real, left = Saver._publish, [saves]

    def publish(saver: Saver, scratch: Path, number: int, place: Place, length: int):
        done = real(saver, scratch, number, place, length)
        left[0] -= 1
        if left[0] == 0 and not place.finished:
            path = saver._run.client(place.state.round + 1, 9)
            path.mkdir(parents=True)
            (path / "adapter_model.safetensors").write_bytes(b"half")
            with saver._run.metrics.open("a") as file:
                file.write('{"event": "st')
            raise Interrupted  # in the thread that writes a client, the run hears of it later
        return done

    monkeypatch.setattr(Saver, "_publish", publish)


@pytest.mark.parametrize("case", CASES)
def test_interrupted_after_every_checkpoint(
    case: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_interrupted(config, case, CASES[case], monkeypatch)


@pytest.mark.parametrize("method", ["fedex", "full"])
def test_a_head_is_resumed_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_head_config(tmp_path, run={"overwrite": False}, lora={"dropout": 0.1})
    check_interrupted(config, method, [f"method.name={method}"], monkeypatch)


def check_interrupted(
    config: Path, case: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config, f"{case}-whole", *options)
    parts, starts = RunDir(directory(config, f"{case}-parts")), 0
    while not any((parts.final / name).exists() for name in ("adapter", "model")):
        with monkeypatch.context() as patch, suppress(Interrupted):
            interrupt_after(patch, 1)
            run(config, parts.path.name, *options, resume=starts > 0)
        starts += 1
    assert starts > 10
    assert_same_result(whole.path, parts.path)
    looks = [x["round"] for x in events(parts.path) if x["event"] == "held_out"]
    assert looks == ([0, 1, 2] if case == "held_out" else [])
    assert len(checkpoint.numbers(parts)) <= 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(config, "sound")
    with monkeypatch.context() as patch, suppress(Interrupted):
        interrupt_after(patch, 4)
        run(config, "damaged")
    broken = RunDir(directory(config, "damaged"))
    last = checkpoint.numbers(broken)[-1]
    file = next(broken.checkpoint(last).glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run(config, "damaged", resume=True)
    told = capsys.readouterr().out
    assert f"{file}: damaged: its SHA-256 is another one; client 1 starts over" in told
    assert f"going on from checkpoint {last}" in told
    assert_same_result(whole.path, broken.path)


def test_a_damaged_manifest_is_named_and_the_checkpoint_before_taken(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(config, "sound too")
    with monkeypatch.context() as patch, suppress(Interrupted):
        interrupt_after(patch, 4)
        run(config, "cut")
    broken = RunDir(directory(config, "cut"))
    last = checkpoint.numbers(broken)[-1]
    file = broken.checkpoint(last) / "manifest.json"
    file.write_bytes(file.read_bytes()[:-5])
    run(config, "cut", resume=True)
    told = capsys.readouterr().out
    assert f"{file}: damaged" in told
    assert "taking the checkpoint before it" in told
    assert f"going on from checkpoint {last - 1}" in told
    assert_same_result(whole.path, broken.path)


def test_a_finished_run_is_left_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(config, "finished", "federation.rounds=1")
    before = sorted((x, x.stat().st_mtime_ns) for x in done.path.rglob("*"))
    run(config, "finished", "federation.rounds=1", resume=True)
    assert "this run is finished; nothing to do" in capsys.readouterr().out
    assert sorted((x, x.stat().st_mtime_ns) for x in done.path.rglob("*")) == before


@pytest.mark.parametrize("case", ["side", "planes", "overflow"])
def test_a_finished_run_is_extended_as_if_it_had_been_longer_from_its_beginning(
    case: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*CASES[case], "partition.num_clients=2", "aggregate.robust=none"]
    whole = run(config, f"{case}-three", *options, "federation.rounds=3")
    part = run(config, f"{case}-one", *options, "federation.rounds=1")
    capsys.readouterr()
    run(config, f"{case}-one", *options, "federation.rounds=3", resume=True)
    assert "federation.rounds: 1, now 3; final/ is made anew" in capsys.readouterr().out
    # What a full side adapter would need is told of as many rounds as the run is to have.
    words = {"round-0001/aggregate.json", "metrics.jsonl"} if case == "overflow" else set()
    assert set(differing(whole.path, part.path)) <= words
    kept = yaml.safe_load((part.path / "config.yaml").read_text())
    assert kept["federation"]["rounds"] == 3
    assert kept["run"]["resume"] == "never"


def test_how_far_a_run_may_be_shortened(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, suppress(Interrupted):
        interrupt_after(patch, 11)
        run(config, "shorter", "federation.rounds=3")  # in its second round
    with pytest.raises(UserError, match=r"federation\.rounds: expected at least 2, .* got 1"):
        run(config, "shorter", "federation.rounds=1", resume=True)
    shorter = run(config, "shorter", "federation.rounds=2", resume=True)
    assert_same_result(run(config, "two").path, shorter.path)


def test_changed_settings(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, suppress(Interrupted):
        interrupt_after(patch, 4)
        run(config, "changed")
    with pytest.raises(
        UserError, match=r"other settings: lora\.alpha, run\.seed; set .* federation\.rounds"
    ):
        run(config, "changed", "lora.alpha=9", "run.seed=3", resume=True)
    rows = Path(yaml.safe_load(config.read_text())["data"]["path"])
    before = rows.read_text()
    rows.write_text(before.replace("apples", "pears").replace("the", "a"))
    with pytest.raises(UserError, match="the data are others"):
        run(config, "changed", resume=True)
    rows.write_text(before)
    capsys.readouterr()
    done = run(config, "changed", "train.micro_batch_size=4", "run.keep=1", resume=True)
    told = capsys.readouterr().out
    assert "changed: train.micro_batch_size; results may differ by rounding" in told
    assert "client 1 starts over" in told
    assert len(checkpoint.numbers(done)) == 1
    steps = [x for x in events(done.path) if x["event"] == "step"]
    assert len({(x["round"], x["client"], x["step"]) for x in steps}) == len(steps) == 18


@pytest.mark.parametrize("packing", ["true", "false"])
def test_tokens_at_once_change_nothing_but_rounding(packing: str, config: Path) -> None:
    """Three examples of some 100 tokens share a pass, and one is left: weighed as in any other."""
    same = [f"train.packing={packing}", "federation.rounds=1", "train.batch_size=8"]
    tokens = ["train.micro_batch_size=1", "train.micro_batch_tokens=600"]
    runs = [run(config, f"one-{packing}", *same), run(config, f"600-{packing}", *same, *tokens)]
    one, other = ([x["loss"] for x in events(x.path) if x["event"] == "step"] for x in runs)
    assert one == pytest.approx(other, rel=1e-5)
    assert one != other


def test_a_run_keeps_the_tokens_that_it_was_begun_with(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ["train.micro_batch_size=1", "train.micro_batch_tokens=auto"]
    with monkeypatch.context() as patch, suppress(Interrupted):
        interrupt_after(patch, 4)
        patch.setattr(room, "tokens_that_fit", lambda config: 600)
        run(config, "begun", *tokens)
    assert "room for 600 tokens at once here (train.micro_batch_tokens)" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(room, "tokens_that_fit", lambda config: 1200)
        begun = run(config, "begun", *tokens, resume=True)
    tokens[1] = "train.micro_batch_tokens=600"
    assert_same_result(run(config, "whole", *tokens).path, begun.path)


def test_nothing_to_go_on_from(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = directory(config, "other")
    other.mkdir(parents=True)
    (other / "mine").write_text("mine")
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        run(config, "other", resume=True)
    assert (other / "mine").read_text() == "mine"
    old = directory(config, "old")
    old.mkdir()
    (old / "config.yaml").write_text("")
    run(config, "old", "federation.rounds=1", resume=True)
    assert "no checkpoint to go on from; starting anew" in capsys.readouterr().out
    for manifest in old.glob("checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("true", "false"))
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        run(config, "old", "federation.rounds=1", resume=True)


def test_a_missing_run_is_started(config: Path) -> None:
    assert (run(config, "new", "federation.rounds=1", resume=True).final / "adapter").exists()


def test_manifest_lists_what_it_relies_on(config: Path) -> None:
    done = run(config, "listed", "aggregate.fold=carry")
    last = done.checkpoint(checkpoint.numbers(done)[-1]) / "manifest.json"
    files = json.loads(last.read_text())["files"]
    assert "clients/round-0001/client-0002/adapter_model.safetensors" in files
    assert "server/round-0002/adapter/adapter_model.safetensors" in files
    assert "partition.json" in files
