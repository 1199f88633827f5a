"""What a person sees in a terminal: something at once, one display of ours, and a heard Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT
from terminal import Terminal

from fedex_scale.runtime import faults

PROGRAM = "import sys; from fedex_scale.cli import main; main(sys.argv[1:])"
RUN = [sys.executable, "-c", PROGRAM, "run", "--config"]
FOREIGN = "Running generate_until|it/s|Loading weights|Generating|fatal:|Warning|warn\\(|Traceback"


def in_terminal(config: Path, folder: Path, *overrides: str) -> Terminal:
    """Start the tiny run, from a directory that no repository has."""
    command = [*RUN, str(config), f"run.dir={folder}", "train.batch_size=1", *overrides]
    return Terminal(
        ["sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command], {"PYTHONPATH": str(ROOT)}
    )


def test_one_display_from_the_first_second_to_the_end(tiny_config: Path, tmp_path: Path) -> None:
    with in_terminal(tiny_config, tmp_path) as terminal:
        terminal.wait_for("loading libraries")
        assert terminal.seen.startswith(f"{tmp_path}/tiny: fedex, 2 rounds, on ")
        terminal.wait_for("reading the data and loading the model")
        assert terminal.wait() == 0, terminal.seen[-2000:]
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.seen)
    assert re.search(r"round \d of 2, client \d \(\d of 3\)", seen)
    assert re.search(r"before training: scoring fedex_word_problems .* [1-4]/4 prompts", seen)
    assert re.search(r"loss [\d.]+, [\d,]+ tokens/s, \d+ s left", seen)
    assert f"talk to it: fedex-scale chat {tmp_path}/tiny" in seen
    assert not re.search(FOREIGN, seen), re.search(f".{{80}}({FOREIGN}).{{80}}", seen, re.DOTALL)


def test_ctrl_c_is_answered_and_the_run_goes_on_later(tiny_config: Path, tmp_path: Path) -> None:
    options = ["run.overwrite=false", "evaluation.tasks=[]", "evaluation.data=null"]
    with in_terminal(tiny_config, tmp_path, *options) as terminal:
        terminal.wait_for("loading libraries")
        terminal.send("\x03")
        assert terminal.wait() == 130
        assert "stopped by SIGINT" in terminal.seen
        assert not (tmp_path / "tiny").exists()
    with in_terminal(tiny_config, tmp_path, *options) as terminal:
        terminal.wait_for("client 0 (1 of 3)")
        terminal.send("\x03")
        assert terminal.wait() == 130
        assert terminal.seen.index("SIGINT: ") < terminal.seen.index("stopped by SIGINT ")
        assert "the same command with --resume goes on" in terminal.seen


def test_a_signal_is_acknowledged_while_the_main_thread_is_busy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in a long backward pass: Python's own handler waits for the call to return."""
    told: list[float] = []

    def listen() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        while not capsys.readouterr().err.startswith("SIGINT: this step ends, then the run saves"):
            time.sleep(0.01)
        told.append(time.perf_counter())

    matrix = torch.eye(900)
    threading.Thread(target=listen, daemon=True).start()
    with faults.handling_signals(), faults.deferring():
        until = time.perf_counter() + 20
        while not told and time.perf_counter() < until:
            torch.linalg.matrix_power(matrix, 2**40)  # one call
            done = time.perf_counter()
            if faults.asked_to_stop():
                break
    assert told
    assert told[0] < done


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--config", "{config}", "train.learning_rat=1"], "did you mean learning_rate"),
        (["--config", "{config}", "model.path=./nowhere"], "no config.json"),
        (["--config", "{config}", "data.path=nowhere.jsonl"], "found none"),
        (["--config", "{config}", "run.dir={taken}", "run.overwrite=false"], "exists; --resume"),
    ],
)
def test_what_can_be_told_without_torch_is_told_without_it(
    arguments: list[str], reason: str, tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny").mkdir()
    known = {"{config}": str(tiny_config), "{taken}": str(tmp_path)}
    for name, value in known.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    heavy = "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    program = PROGRAM.replace("main(sys.argv[1:])", f"\ntry: main(sys.argv[1:])\nfinally: {heavy}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    command = [sys.executable, "-c", program, "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert reason in line
    assert done.stdout == "[]\n"
    environment["RANK"] = "1"  # rank 0 speaks for all
    if "nowhere.yaml" in arguments:
        other = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (other.returncode, other.stderr) == (2, "")


@pytest.mark.parametrize("command", ["data", "plan", "doctor", "client-round"])
def test_every_command_looks_for_its_config_first(command: str) -> None:
    heavy = "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    program = PROGRAM.replace("main(sys.argv[1:])", f"\ntry: main(sys.argv[1:])\nfinally: {heavy}")
    arguments = [command, "--config", "nowhere.yaml"]
    arguments += ["--server", "x", "--out", "y"] * (command == "client-round")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "[]\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --config: cannot read nowhere.yaml")
