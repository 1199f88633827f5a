"""What a run's YAML may hold at all: plain, small, and from a file; else one line says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedex_scale.config.load import load_config
from fedex_scale.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "run.yaml: not valid YAML"),
        ("- 1\n- 2\n", "run.yaml: expected sections (run, model, ...), got list"),
        ("run: 3\n", "run: expected a section with keys, got 3"),
    ],
)
def test_files_that_are_no_config(load, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text=text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rank: 4}\ntrain: {}\nlora: {rank: 5}\n", "line 3: 'lora' is there twice"),
        ("lora: {rank: 4, rank: 5}\n", "line 1: 'rank' is there twice"),
        ("run: {name: !!python/name:os.system x}\n", "line 1: expected no tag, got"),
        ("run: {seed: !!int '3'}\n", "line 1: expected no tag, got"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "line 2: expected an alias of one value"),
        ("a: &a [*a]\n", "line 1: expected an alias of one value"),
        ("? [a, b]\n: 1\n", "line 1: expected a name as key"),
        ("a: " + 30 * "[" + 30 * "]", "line 1: more than 10,000 values, or 20 within each other"),
        ("a: " + 300_000 * "[", "line 1: more than 10,000 values, or 20 within each other"),
        ("a: [" + 10_000 * "1, " + "1]", "line 1: more than 10,000 values, or 20 within"),
        ("run: {seed: " + 9_000 * "9" + "}\n", "run.seed: expected a whole number from 0 to"),
        ("train: {batch_size: 010}\n", "train.batch_size: expected a whole number from 1 to"),
        ("train: {batch_size: 1:30}\n", "train.batch_size: expected a whole number from 1 to"),
        ("train: {learning_rate: 1" + 300 * ":59" + ".0}\n", "train.learning_rate: expected a"),
        ("train: {<<: {batch_size: 4}}\n", "line 1: expected keys written out, got a merge (<<)"),
        ("evaluation: {data: {yes: a, true: b}}\n", "line 1: 'true' is there twice; keep one"),
        ('run: {name: "a\\ud800"}\n', "line 1: expected characters, got half of one"),
        ("run: {name: " + 10_001 * "x" + "}\n", "line 1: expected at most 10,000 characters"),
        ('run: {name: "a\\0b"}\n', "line 1: expected at most 10,000 characters, and no NUL"),
        ("#" * 1_000_001, "expected at most 1,000,000 bytes, got more"),
    ],
)
def test_yaml_that_no_settings_need_is_refused_on_one_line(load, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text=text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_alias_of_one_value_is_fine(load) -> None:
    config = load(text="model: {path: &name m}\ndata: {path: d, local: *name}\n")
    assert config.data.local == "m"


def test_what_the_user_wrote_cannot_reach_the_terminal_as_commands(load) -> None:
    asked = "model: {path: m}\ndata: {path: d}\n"
    for text in (
        asked + 'evaluation: {data_dir: "\\e[2J"}',
        'model: {config: "\\e[2J"}',
        'data: {path: d, data_dir: "\\e[2J"}',
        'data: {path: d, prompt_column: "\\e[2J"}',
        'run: {name: "\\e[2J/"}',
        '"lora\\e[31m": 1',
        'lora: {"\\e[2J": 1}',
        'lora: {rank: "\\e[2J"}',
    ):
        with pytest.raises(UserError) as caught:
            load(text=text)
        assert "\x1b" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        load("lora.rank=" + "x" * 9_000, "y" * 9_000 + "=1")
    assert len(str(caught.value)) < 1_000


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"expected a regular file, got "):
            load_config(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--config: cannot read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="expected a regular file, got a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "tree",
    [
        {"run": {"\ud800": 1}},
        {"\ud800": {}},
        {"self": 1},
        {"run": {"self": 1}},
        {"run": {"name": "\ud800"}},
        {"run": {"name": "a\x1b[2J"}},
        {"run": {"dir": ""}},
    ],
    ids=ascii,
)
def test_keys_and_names_that_are_no_text(tree: dict) -> None:
    sound = {"model": {"path": "x"}, "data": {"path": "x.jsonl"}}
    with pytest.raises(UserError) as caught:
        load_config(sound | tree)
    assert str(caught.value).isprintable()
