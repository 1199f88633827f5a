"""What one does with a finished run: talk to it in a pipe and in a terminal, and push it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_hub import TOKEN, Hub, fake_hub
from launching import ROOT
from peft import PeftModel
from terminal import Terminal
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedex_scale.afterwards.dialogue import converse
from fedex_scale.cli import main
from fedex_scale.data.prompts import MATH_PROMPT
from fedex_scale.runtime.errors import UserError

PROGRAM = "import sys; from fedex_scale.cli import main; main(sys.argv[1:])"
QUESTION = "Tom has 12 apples and buys 7 more. How many apples does he have now?"


@pytest.fixture(scope="module")
def run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training shows: the tiny model's answers after are others than before."""
    folder = tmp_path_factory.mktemp("afterwards")
    options = [
        "run.name=done",
        f"run.dir={folder}",
        "train.learning_rate=0.3",
        "evaluation.tasks=[]",
    ]
    options += ["federation.rounds=1", "evaluation.data=null"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), *options])
    assert not ended.value.code
    return folder / "done"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }.items():
            monkeypatch.setenv(name, value)
        yield hub


def answer_of(run: Path, *, trained: bool) -> str:
    """Return what transformers and PEFT alone write, greedily, after the trained prompt."""
    config = json.loads((run / "final" / "adapter" / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    if trained:
        model = PeftModel.from_pretrained(model, run / "final" / "adapter")
    ids = tokenizer(MATH_PROMPT.format(instruction=QUESTION), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def told(run: Path, *arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "chat", str(run), "--max-new-tokens", "12"]
    return subprocess.run(
        [*command, *arguments],
        input=input,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_pipe_gets_an_answer_a_line_before_and_after(run: Path) -> None:
    done = told(run, input=f"{QUESTION}\n\n/before\n{QUESTION}\n")
    assert done.returncode == 0, done.stderr
    after, before = answer_of(run, trained=True), answer_of(run, trained=False)
    assert after != before
    printable = "".join(c for c in f"{after}\n{before}\n" if c.isprintable() or c in "\n\t")
    assert done.stdout == printable
    assert done.stderr == ""


def test_in_a_terminal_tab_asks_the_other_model(run: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "chat", str(run), "--max-new-tokens", "12"]
    with Terminal(command, env={"PYTHONPATH": str(ROOT)}) as terminal:
        terminal.wait_for("after> ")
        terminal.send(f"{QUESTION}\r")
        terminal.wait_for("after> ", times=2)
        terminal.send("half a line\t")
        terminal.wait_for("before> ")
        terminal.send("\x04")
        assert terminal.wait() == 0
    assert "before, once more: Tom has 12 apples" in terminal.seen


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "chat"], "expected a tokenizer with a chat template"),
        (["--prompt", "chta"], "expected one of auto, trained, chat, none"),
    ],
)
def test_a_prompt_that_cannot_be_is_one_line(
    arguments: list[str], reason: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(run), *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --prompt")
    assert reason in line


def test_bytes_that_are_no_text_are_told_by_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    talker = SimpleNamespace(ask=lambda question, *_: asked.append(question), stop=lambda: None)
    lines = io.TextIOWrapper(io.BytesIO(b"ok {0}\n" + b"caf\xe9\n"))
    monkeypatch.setattr(sys, "stdin", lines)
    with pytest.raises(UserError, match="standard input: line 2: expected UTF-8"):
        converse(talker, "after")
    assert asked == ["ok {0}"]


def pushed(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "push", str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_push_lets_others_load_it(run: Path, hub: Hub, tiny_llama: Path, tmp_path: Path) -> None:
    done = pushed(run, "me/mine", "--base", "org/base", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/me/mine\n"
    assert hub.private == {"me/mine": True}
    assert hub.commits == 1
    files = hub.files["me/mine"]
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.html",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    own, theirs = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), place)
        for place in (run / "final" / "exact_adapter", tmp_path)
    )
    ids = torch.arange(3, 20)[None]
    assert torch.equal(own(ids).logits, theirs(ids).logits)
    card = files["README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "me/mine")' in card
    assert "vllm serve org/base --enable-lora --max-lora-rank" in card
    assert str(tiny_llama) not in card
    assert b"<html" in files["report.html"]


@pytest.mark.parametrize("name", ["final/exact_adapter/adapter_model.safetensors", "metrics.jsonl"])
def test_what_is_damaged_is_not_pushed(run: Path, hub: Hub, name: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / name).open("r+b") as file:
        file.seek(-3, os.SEEK_END) if name.startswith("final") else file.seek(40)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    done = pushed(tmp_path / "run", "me/mine", "--base", "org/base")
    assert (done.returncode, hub.files) == (2, {})
    assert re.fullmatch(rf"error: .*{name}: damaged: .*--resume makes it again\n", done.stderr)


def test_what_the_hub_refuses_is_one_line(run: Path, hub: Hub) -> None:
    hub.refuses = ("/commit/", 403)
    done = pushed(run, "me/mine", "--base", "org/base")
    assert done.returncode == 2
    assert done.stderr == (
        "error: push: the hub refuses me/mine: 403 You may not do that; use a token that may write "
        "there\n"
    )
    assert hub.files == {"me/mine": {}}


def test_what_can_be_told_without_the_hub(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("")
    cases = {
        "expected the base's OWNER/NAME": [str(run), "me/mine"],
        "expected OWNER/NAME of the hub": [str(run), "mine"],
        "expected a run's directory": [str(tmp_path / "nothing"), "me/mine"],
        "expected a finished run": [str(tmp_path), "me/mine"],
    }
    for reason, arguments in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(["push", *arguments])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
