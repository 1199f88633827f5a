"""What `fedex-scale aggregate` cannot use: one line, exit code 2, BASE untouched, no OUT."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import near, random_pairs, save_adapter

from fedex_scale.cli import main
from fedex_scale.files import tensorfile
from fedex_scale.runtime import outputs

ROOT = Path(__file__).parents[2]
LAYER = "model.layers.0.self_attn.q_proj"
SHAPES = {LAYER: (64, 48), "model.layers.1.mlp.down_proj": (48, 112)}
KEY = f"base_model.model.{LAYER}.lora_B.weight"


def make_clients(tmp_path: Path, shapes: dict = SHAPES) -> list[Path]:
    start = random_pairs(shapes, rank=4, seed=0)
    return [
        save_adapter(tmp_path / f"client-{k}", near(start, spread=0.1, seed=k), alpha=2)
        for k in range(3)
    ]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["aggregate", *map(str, arguments)])
    return caught.value.code


def sizes(directory: Path) -> dict[str, tuple[int, int]]:
    stats = {str(file): file.stat() for file in directory.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def edit_tensors(client: Path, edit: Callable[[dict], object]) -> None:
    file = client / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(client: Path, **values: object) -> None:
    file = client / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def garble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20:40] = b"\xff" * 20
    file.write_bytes(data)


def to_pickle(client: Path) -> None:
    """Leave only a pickle, which must not even be opened: loading it would run a command."""
    file = client / "adapter_model.safetensors"
    file.unlink()
    (client / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


DAMAGE = {
    "truncated": (lambda c: cut(c / "adapter_model.safetensors"), ["client-1", "damaged"]),
    "corrupt": (lambda c: garble(c / "adapter_model.safetensors"), ["client-1", "damaged"]),
    "NaN": (
        lambda c: edit_tensors(c, lambda t: t[KEY].__setitem__((3, 1), math.nan)),
        ["client-1", LAYER, "NaN or Inf"],
    ),
    "Inf": (
        lambda c: edit_tensors(c, lambda t: t[KEY].__setitem__((3, 1), math.inf)),
        ["client-1", LAYER, "NaN or Inf"],
    ),
    "missing layer": (
        lambda c: edit_tensors(c, lambda t: [t.pop(KEY), t.pop(KEY.replace("lora_B", "lora_A"))]),
        ["client-1", LAYER, "missing"],
    ),
    "another shape": (
        lambda c: edit_tensors(c, lambda t: t.update({KEY: torch.ones(60, 4)})),
        ["client-1", LAYER, "expected shape (64, 48), got (60, 48)"],
    ),
    "another rank": (
        lambda c: edit_tensors(c, lambda t: t.update({KEY: torch.ones(64, 3)})),
        ["client-1", LAYER, "expected matrices of rank 4"],
    ),
    "pickle": (to_pickle, ["client-1", "save the adapter as safetensors"]),
    "DoRA": (lambda c: edit_config(c, use_dora=True), ["client-1", "use_dora"]),
    "bias": (lambda c: edit_config(c, bias="lora_only"), ["client-1", "bias", "lora_only"]),
    "PiSSA": (
        lambda c: edit_config(c, init_lora_weights="pissa_niter_4"),
        ["client-1", "init_lora_weights"],
    ),
    "embedding": (
        lambda c: edit_tensors(
            c,
            lambda t: t.update(
                {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 400)}
            ),
        ),
        ["client-1", "lora_embedding_A"],
    ),
    "head of one": (
        lambda c: edit_tensors(
            c, lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 48)})
        ),
        ["score.weight", "only some clients have it"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_client_that_cannot_be_used(kind, tiny_llama, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    clients = make_clients(tmp_path)
    damage, parts = DAMAGE[kind]
    damage(clients[1])
    assert_refused(tiny_llama, tmp_path, capsys, clients, parts, "--fold", "round")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--weights", "1,-1,1"), ["weights: client 1", "got -1.0"]),
        (("--weights", "0,0,0"), ["weights: expected at least one above 0"]),
        (("--weights", "1,2"), ["weights: expected 3, one a client, got 2"]),
        (("--weights", "1,x,2"), ["weights: expected numbers"]),
        (("--weights", "1,nan,2"), ["weights: client 1"]),
        (("--method", "fedx"), ["method.name", "did you mean fedex?"]),
        (("--method", "centralized"), ["one client"]),
        (("--fold", "sideways"), ["one of side, planes, carry, round"]),
        (("--fold", "planes"), ["planes is for runs"]),
        (("--side-rank", "0"), ["side_rank"]),
        (("--dtype", "int8"), ["dtype: expected float32"]),
        (("--assign", "keep", "--fold", "round"), ["assign: keep"]),
    ],
)
def test_options_that_cannot_be_used(options, parts, tiny_llama, tmp_path, capsys) -> None:
    assert_refused(tiny_llama, tmp_path, capsys, make_clients(tmp_path), parts, *options)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--assign", "keep"),
        ("--assign", "reinit"),
        ("--assign", "svd"),
        ("--svd-rank", "2"),
        ("--side-rank", "1"),
        ("--fold", "round"),
        ("--fold", "round", "--dtype", "float32"),
        ("--fold", "carry", "--method", "flora"),
        ("--method", "flexlora"),
        ("--method", "lora_fair"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("number", [3e38, 1e30])
def test_finite_numbers_whose_result_is_not(number, options, tiny_llama, tmp_path, capsys) -> None:
    clients = make_clients(tmp_path)
    for client, sign in zip(clients, (1, -1, 1), strict=True):
        edit_tensors(client, lambda t, sign=sign: [x.fill_(sign * number) for x in t.values()])
    assert_finite_or_refused(tiny_llama, tmp_path, capsys, clients, options)


@pytest.mark.parametrize(
    ("shapes", "parts"),
    [
        ({"model.layers.7.self_attn.q_proj": (64, 48)}, ["layers.7", "no such weight"]),
        ({LAYER: (64, 44)}, [LAYER, "got (64, 48)", "another base model"]),
    ],
)
def test_adapters_for_another_base(shapes, parts, tiny_llama, tmp_path, capsys) -> None:
    clients = make_clients(tmp_path, shapes)
    assert_refused(tiny_llama, tmp_path, capsys, clients, parts)


@pytest.mark.parametrize(
    "kind", ["no config", "truncated", "a file is gone", "a pickle", "nowhere"]
)
def test_a_base_that_cannot_be_used(kind, tiny_llama, tmp_path, capsys) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    first = min(base.glob("*.safetensors"))
    if kind == "no config":
        (base / "config.json").unlink()
    elif kind == "truncated":
        cut(first)
    elif kind == "a file is gone":
        first.unlink()
    elif kind == "a pickle":
        for file in base.glob("*safetensors*"):
            file.unlink()
        (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    else:
        shutil.rmtree(base)
    parts = {
        "no config": ["config.json"],
        "truncated": [first.name, "damaged"],
        "a file is gone": [first.name, "cannot be read"],
        "a pickle": ["save the base model as safetensors"],
        "nowhere": ["found neither"],
    }[kind]
    assert_refused(base, tmp_path, capsys, make_clients(tmp_path), parts, "--fold", "round")


def test_out_must_be_new_and_outside_the_base(tiny_llama, tmp_path, capsys) -> None:
    clients, before = make_clients(tmp_path), sizes(tiny_llama)
    for out, part in ((tiny_llama / "a" / "out", "lies inside"), (tiny_llama, "exists")):
        assert run("--base", tiny_llama, "--out", out, *clients) == 2
        assert part in capsys.readouterr().err
        assert sizes(tiny_llama) == before


def test_no_room_is_known_beforehand(tiny_llama, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        outputs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})
    )
    clients = make_clients(tmp_path)
    assert_refused(tiny_llama, tmp_path, capsys, clients, ["of room, got 10 kB"])


def test_a_disk_that_fills_up_leaves_nothing(tiny_llama, tmp_path, capsys, monkeypatch) -> None:
    clients, calls = make_clients(tmp_path), []

    def write_all(file, *data: memoryview) -> None:
        calls.append(file)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(b"".join(data))

    monkeypatch.setattr(tensorfile, "_write_all", write_all)
    parts = ["No space left on device"]
    assert_refused(tiny_llama, tmp_path, capsys, clients, parts, "--fold", "round")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(number, tiny_llama, tmp_path) -> None:
    """The signal comes when the first tensor has been written."""
    clients, out = make_clients(tmp_path), tmp_path / "out"
    program = (
        "import time; from fedex_scale import cli; from fedex_scale.aggregation import offline\n"
        "def wait(task, *rest, **named):\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "offline.aggregate = wait\n"
        f"cli.main(['aggregate', '--base', {str(tiny_llama)!r}, '--out', {str(out)!r}, "
        + ", ".join(repr(str(client)) for client in clients)
        + "])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in clients}


def assert_refused(base, tmp_path, capsys, clients, parts, *options) -> None:
    before, there = sizes(base), set(tmp_path.iterdir())
    assert run("--base", base, "--out", tmp_path / "out", *options, *clients) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert sizes(base) == before
    assert set(tmp_path.iterdir()) == there


def assert_finite_or_refused(base, tmp_path, capsys, clients, options) -> None:
    """What is written is finite, and what cannot be is refused; nothing is in between."""
    code = run(*clients, "--base", base, "--out", tmp_path / "out", *options)
    told = capsys.readouterr().err
    if code == 0:
        for file in (tmp_path / "out").rglob("*.safetensors"):
            assert all(x.isfinite().all() for x in load_file(file).values()), file
        report = (tmp_path / "out" / "report.json").read_text()
        assert "NaN" not in report
        assert "Infinity" not in report
        return
    assert code == 2
    assert "NaN or Inf" in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))
