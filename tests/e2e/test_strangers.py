"""Files of strangers, through the command line: one line, or a sound result."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file, save_file
from tiny import random_pairs, save_adapter

from fedex_scale.cli import main
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.tensorfile import SafetensorsReader
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

LAYER = "model.layers.0.self_attn.q_proj"


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that refuses a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert (ended.value.code, len(lines)) == (2, 1)
    return lines[0]


@pytest.fixture
def clients(tmp_path: Path) -> list[Path]:
    pairs = random_pairs({LAYER: (64, 48)}, rank=2, seed=0)
    return [save_adapter(tmp_path / f"c{k}", pairs, alpha=4) for k in range(2)]


@pytest.mark.parametrize("where", ["/etc/passwd", "/dev/urandom"])
def test_a_base_whose_links_lead_out_is_not_copied(
    where: str, tiny_llama: Path, clients: list[Path], tmp_path: Path, capsys
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "notes.txt").symlink_to(where)
    out = tmp_path / "out"
    arguments = ["--base", base, "--out", out, "--fold", "round", "--assign", "reinit"]
    assert "notes.txt: expected a" in told(capsys, "aggregate", *arguments, *clients)
    assert not out.exists()


def test_out_does_not_lie_in_what_is_read(tiny_llama: Path, clients: list[Path], capsys) -> None:
    arguments = ["--base", tiny_llama, "--out", clients[0] / "out", *clients]
    assert f"lies inside {clients[0]}" in told(capsys, "aggregate", *arguments)
    assert not (clients[0] / "out").exists()


@pytest.mark.parametrize("way", ["OLoRA", "pissa_niter_4"])
def test_an_adapter_that_changes_its_base(
    way: str, tiny_llama: Path, clients: list[Path], tmp_path: Path, capsys
) -> None:
    file = clients[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": way}))
    out = tmp_path / "out"
    assert way in told(capsys, "aggregate", "--base", tiny_llama, "--out", out, *clients)


def test_lists_that_hold_nothing_take_no_memory() -> None:
    with pytest.raises(ValueError, match="lists and objects in"):
        door.parse_json("[" + "[]," * 20_000 + "0]")


def test_what_was_checked_is_what_is_read(clients: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("checked")
    with door.opened(tmp_path / "a") as file:
        (tmp_path / "a").unlink()
        os.mkfifo(tmp_path / "a")
        assert file.read() == b"checked"
    adapter = Adapter(clients[0])
    tensors = load_file(clients[0] / "adapter_model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, clients[0] / "swapped", metadata={"format": "pt"})
    (clients[0] / "swapped").replace(clients[0] / "adapter_model.safetensors")
    with pytest.raises(UserError, match="was changed while it was read"):
        adapter.pair(LAYER)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_factors_of_dtypes_that_mean_nothing(
    dtype: torch.dtype, tiny_llama: Path, clients: list[Path], tmp_path: Path, capsys
) -> None:
    file = clients[1] / "adapter_model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    arguments = ["--base", tiny_llama, "--out", tmp_path / "out"]
    line = told(capsys, "aggregate", *arguments, *clients)
    assert line.startswith(f"error: {clients[1]}")


@pytest.mark.parametrize("kind", ["crowd", "empty", "long"])
def test_headers_that_would_take_memory(kind: str, tmp_path: Path) -> None:
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = {
        "crowd": (b'"%d":%s' % (i, entry) for i in range(150_000)),
        "empty": (b'"%d":{}' % i for i in range(300_000)),
        "long": (b'"%s":%s' % (b"n" * 10**6, entry) for _ in range(1)),
    }
    header = b"{" + b",".join(entries[kind]) + b"}"
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError) as caught:
        SafetensorsReader(tmp_path / "x")
    assert len(str(caught.value)) < 3000


def test_markup_and_escapes_in_names_stay_text(
    clients: list[Path], tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    odd = clients[1].rename(tmp_path / "[bold]\x1b[31m[.]")
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "aggregate",
                "--base",
                str(tiny_llama),
                "--out",
                str(tmp_path / "out"),
                *2 * [str(odd)],
            ]
        )
    told = capsys.readouterr()
    assert ended.value.code == 0
    assert "[bold]\\x1b[31m[.] is listed 2 times" in told.out.replace("\n", "")
    assert "\x1b[31m" not in told.out + told.err


def test_a_password_in_an_address_is_not_echoed(capsys, tmp_path: Path, tiny_llama: Path) -> None:
    config = tmp_path / "run.yaml"
    address = "https://somebody:sekret@example.invalid/rows.jsonl"
    tree = {"model": {"path": str(tiny_llama)}, "data": {"path": address}}
    config.write_text(json.dumps(tree))
    line = told(capsys, "data", "--config", config)
    assert "example.invalid" in line
    assert "sekret" not in line


@pytest.mark.parametrize("end", ["> /dev/full", ">&- 2>&- <&-", "| true"])
def test_standard_output_that_takes_nothing(
    end: str, tiny_llama: Path, clients: list[Path], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "fedex_scale.cli", "aggregate", "--base", tiny_llama]
    words += ["--out", tmp_path / "out", *clients]
    line = f"set -o pipefail; ulimit -n 64; {' '.join(map(str, words))} {end}"
    odd = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "HF_HOME": "/proc/none"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LANG": "C", **odd}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["adapter", "report.json"]
    assert "Traceback" not in done.stderr
