"""Any file that a power cut damaged: the run goes on and ends with the same bits, or says why not.

What a killed run has on disk is emptied, cut, zeroed in part or deleted, a file after another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from resuming import assert_same_result, differing, write_config

from fedex_scale.cli import main
from fedex_scale.federation.saves import Saver
from fedex_scale.run import run_config

SAVES = 15  # in the second round, with a client that is done and one that is being trained

Damage = Callable[[bytes], bytes | None]
DAMAGE: dict[str, Damage] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a zero block": lambda data: data[: len(data) // 3] + bytes(16) + data[len(data) // 3 + 16 :],
    "gone": lambda data: None,
}


class PowerCut(BaseException):
    """Nothing is cleaned up."""


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("power")
    heldout = {"fedex_word_problems": str(folder / "heldout.jsonl")}
    evaluation = {"tasks": list(heldout), "data": heldout, "limit": 1, "batch_size": 1}
    evaluation["every_rounds"] = 1
    small = {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}
    return write_config(
        tiny_llama, folder, evaluation=evaluation, lora=small, partition={"num_clients": 2}
    )


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    return run_config(config, ["run.name=whole"])


@pytest.fixture(scope="module")
def killed(config: Path) -> Path:
    real, left = Saver._publish, [SAVES]

    def publish(saver: Saver, *arguments):
        done = real(saver, *arguments)
        left[0] -= 1
        if not left[0]:
            raise PowerCut
        return done

    with pytest.MonkeyPatch.context() as patch, suppress(PowerCut):
        patch.setattr(Saver, "_publish", publish)
        run_config(config, ["run.name=killed"])
    path = config.parent / "runs" / "killed"
    assert (path / "clients/round-0002/client-0000/client.json").is_file()
    assert (newest(path) / "rank-0000.safetensors").is_file()
    return path


def files_of(run: Path) -> list[str]:
    return sorted(str(x.relative_to(run)) for x in run.rglob("*") if x.is_file())


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "partition.json",
        "report.json",
        "clients/round-0002/client-0000/adapter_model.safetensors",
        "clients/round-0002/client-0000/client.json",
        "evaluations/round-0001/samples.jsonl",
        "server/round-0001/adapter/adapter_model.safetensors",
        "manifest.json",
        "rank-0000.safetensors",
    ],
)
@pytest.mark.slow
def test_each_file_of_a_run_that_was_killed(
    kind: str, name: str, config: Path, whole: Path, killed: Path, capsys
) -> None:
    check(kind, name, config, whole, killed, capsys)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("empty", "config.yaml"),
        ("zeros at the end", "metrics.jsonl"),
        ("half", "partition.json"),
        ("gone", "clients/round-0002/client-0000/adapter_model.safetensors"),
        ("a zero block", "evaluations/round-0001/samples.jsonl"),
        ("half", "server/round-0001/adapter/adapter_model.safetensors"),
    ],
)
def test_a_file_of_a_run_that_was_killed(
    kind: str, name: str, config: Path, whole: Path, killed: Path, capsys
) -> None:
    check(kind, name, config, whole, killed, capsys)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "README.md"])
def test_final_files_that_were_lost_are_written_again(
    name: str, config: Path, whole: Path, capsys
) -> None:
    lost = copied(whole, "lost")
    (lost / "final" / name).write_bytes(b"")
    assert resume(config, lost) == 0
    assert "the final files are written again" in capsys.readouterr().out
    assert_same_result(whole, lost)


def test_a_base_that_was_changed_is_named(
    config: Path, killed: Path, tiny_llama: Path, capsys
) -> None:
    run, file = copied(killed, "rebased"), sorted(tiny_llama.glob("*.safetensors"))[0]
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert resume(config, run) == 2
    finally:
        file.write_bytes(before)
    error = capsys.readouterr().err
    assert f"{file.name} was changed since the run was begun" in error
    assert resume(config, run) == 0


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_data_that_were_changed_are_named(
    name: str, config: Path, whole: Path, killed: Path, capsys
) -> None:
    run, file = copied(killed, "changed"), config.parent / name
    (run / "partition.json").write_bytes(b"")  # lost, too: it is made again from the data
    before = file.read_bytes()
    try:
        file.write_bytes(before.replace(b"1", b"2", 1))
        assert resume(config, run) == 2
    finally:
        file.write_bytes(before)
    told = capsys.readouterr().err
    assert "the data are others" in told or "heldout.jsonl was changed since" in told
    assert resume(config, run) == 0
    assert_same_result(whole, run)


def test_figures_that_nothing_needs_are_gone_on_without(
    config: Path, whole: Path, killed: Path, capsys
) -> None:
    run = copied(killed, "unmeasured")
    (run / "server/round-0001/deviation.json").write_bytes(b"{")
    assert resume(config, run) == 0
    assert "goes on without it, which it does not need" in capsys.readouterr().out
    assert differing(whole, run) == ["round-0001/deviation.json"]


def test_a_manifest_of_another_checkpoint_is_not_believed(
    config: Path, whole: Path, killed: Path, capsys
) -> None:
    run = copied(killed, "older")
    *_, before, last = sorted((run / "checkpoints").iterdir())
    (last / "manifest.json").write_bytes((before / "manifest.json").read_bytes())
    assert resume(config, run) == 0
    assert f"it is that of checkpoint {int(before.name)}" in capsys.readouterr().out
    assert_same_result(whole, run)


def test_two_files_of_a_client_in_training_are_damaged_at_once(
    config: Path, whole: Path, killed: Path, capsys
) -> None:
    run = copied(killed, "twice")
    for name in ("rank-0000.safetensors", "adapter/adapter_model.safetensors"):
        (newest(run) / name).write_bytes(b"")
    assert resume(config, run) == 0
    assert capsys.readouterr().out.count("starts over") == 1
    assert_same_result(whole, run)


@pytest.mark.parametrize(
    "name", ["clients", "clients/round-0002", "evaluations", "final", "metrics.jsonl"]
)
def test_nothing_is_written_or_deleted_behind_a_link(
    name: str, config: Path, killed: Path, tmp_path: Path, capsys
) -> None:
    run, place = copied(killed, "linked"), copied(killed, "linked") / name
    elsewhere = tmp_path / "elsewhere"
    if place.exists():
        place.rename(elsewhere)
    else:
        elsewhere.mkdir()
    place.symlink_to(elsewhere)
    before = {x: x.is_file() and x.read_bytes() for x in [elsewhere, *elsewhere.rglob("*")]}
    assert resume(config, run) == 2
    assert f"{name}: expected the run's own, got a link" in capsys.readouterr().err
    after = {x: x.is_file() and x.read_bytes() for x in [elsewhere, *elsewhere.rglob("*")]}
    assert after == before


def test_what_others_left_among_checkpoints_is_not_in_the_way(
    config: Path, whole: Path, killed: Path
) -> None:
    run = copied(killed, "littered")
    (run / "checkpoints" / ".DS_Store").write_bytes(b"x")
    assert resume(config, run) == 0
    assert_same_result(whole, run)


@pytest.mark.parametrize("place", [{"done": [0, 999]}, {"running": 9}, {"config": {}}])
def test_a_checkpoint_of_clients_that_are_not_there_is_named(
    place: dict, config: Path, killed: Path, capsys
) -> None:
    run = copied(killed, "tampered")
    file = newest(run) / "manifest.json"
    tree = json.loads(file.read_text())
    tree.pop("sha256")
    if "config" in place:
        tree |= place
    elif "done" in place:
        tree["place"] |= place
    else:
        tree["place"]["running"]["client"] = place["running"]
    tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(tree))
    assert resume(config, run) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("error: ") == 1


def check(kind: str, name: str, config: Path, whole: Path, killed: Path, capsys) -> None:
    run = copied(killed, "cut")
    place = run / name if "/" in name or (run / name).exists() else newest(run) / name
    data = DAMAGE[kind](place.read_bytes())
    place.unlink()
    if data is not None:
        place.write_bytes(data)
    code = resume(config, run)
    told = capsys.readouterr()
    if code == 0:
        assert_same_result(whole, run)
        config_is = run / "config.yaml"
        assert len(config_is.read_text()) > 1000
    else:
        assert code == 2
        assert len([x for x in told.err.splitlines() if x.startswith("error: ")]) == 1
        assert name.rsplit("/", 1)[-1] in told.err
    assert "Traceback" not in told.err


def copied(run: Path, name: str) -> Path:
    to = run.with_name(name)
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(run, to)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def resume(config: Path, run: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(config), "--resume", f"run.name={run.name}"])
    return ended.value.code
