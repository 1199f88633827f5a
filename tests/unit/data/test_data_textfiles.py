"""A row of JSON or CSV is trained whole or refused, in whichever file and wherever it stands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from own_rows import RECOGNISED, read, texts, write

from fedex_scale.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def read_texts_of(tmp_path: Path, files: dict[str, str], *overrides: str) -> list[str]:
    """Return what is trained of files, the pattern being *.SUFFIX."""
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pattern = str(tmp_path / f"*{Path(name).suffix}")
    clients = read("partition.num_clients=1", "data.holdout=0", *overrides, data={"path": pattern})
    return texts(clients.train)[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_what_one_file_alone_has_is_trained(first: str, suffix: str, tmp_path: Path):
    short = [{"instruction": "Say hello", "output": "Hello"}]
    long = [{"instruction": "Translate", "input": "the pens", "output": "apples"}]
    other = "b" if first == "a" else "a"
    files = {f"{first}{suffix}": short, f"{other}{suffix}": long}
    written = {
        ".jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps,
        ".csv": lambda rows: "\n".join([",".join(rows[0]), *(",".join(x.values()) for x in rows)]),
    }[suffix]
    trained = read_texts_of(tmp_path, {name: written(rows) for name, rows in files.items()})
    assert sum("### Input:\nthe pens" in text for text in trained) == 1
    assert len(trained) == 2


def test_keys_of_turns_that_nobody_looks_at_are_told(tmp_path: Path):
    user, answer = RECOGNISED["chat"]["messages"]
    turns = [user, answer | {"reasoning_content": "so", "weight": 1}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns, "id": i} for i in range(3)])
    notes = read(data={"path": path, "chat_template": "zephyr"}).notes
    assert "data: not used of its columns: id, messages.reasoning_content" in notes


def test_a_turn_that_is_no_text_is_refused_wherever_it_stands(tmp_path: Path):
    good, bad = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": x}] for x in ("b", 5)
    )
    path = write(tmp_path / "rows.jsonl", [{"messages": x} for x in [*[good] * 1200, bad]])
    with pytest.raises(UserError, match=r"rows.jsonl: line 1201: .*expected"):
        read(data={"path": path, "chat_template": "zephyr"})


def test_a_file_that_changed_is_read_anew(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for word in ("pens", "cows"):
        text = "".join(json.dumps({"text": f"{i} {word}"}) + "\n" for i in range(3))
        assert any(word in x for x in read_texts_of(tmp_path, {path.name: text}))
        os.utime(path, (10**9, 10**9))
    assert any("cows" in x for x in read_texts_of(tmp_path, {path.name: text}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\nGood morning, how are you\n", "line 2: expected 1 cells, .* got 2"),
        ("a.csv", "prompt,completion\na,b\na\n", "line 3: expected 2 cells, .* got 1"),
        ("a.csv", "prompt,completion,completion\na,b,c\n", "line 1: two columns of the name"),
        ("a.csv", 'prompt,completion\na,"b\n', "line 2: not valid CSV"),
        ("a.csv", "prompt,completion\n", "a.csv: expected at least one row"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "line 1: 'prompt' is"),
        ("a.jsonl", "{}\n{}\n", r"line 1: expected a row with named columns, got {}"),
        (
            "a.jsonl",
            '{"text": "a", "n": 36893488147419103232}\n',
            "line 1: expected .* 64 bits, got",
        ),
        ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}\n", "line 1: expected numbers of at"),
        ("a.jsonl", '{"text": "a"}\n{"text": NaN}\n', "line 2: expected finite numbers, got nan"),
        ("a.json", '[{"text": "a"}, {"text": "b", "text": "c"}]', "'text' is there twice in {'tex"),
        ("a.csv", "prompt, completion\na,b\n", "got columns prompt, ' completion', which"),
        ("a.csv", "prompt\tcompletion\na\tb\n", "as its cells are divided by tabs; save it"),
        *(
            (
                "a.jsonl",
                '{"text": "a", "m": ' + n * "[" + n * "]" + "}\n",
                "line 1: .* at most 50 l",
            )
            for n in (70, 400, 900)
        ),
        ("a.jsonl", '{"text": "a", "m": ' + 400 * '{"a": ' + "1" + 401 * "}", "line 1: .*most 50"),
        (
            "a.jsonl",
            '{"a": {"b": 1}}\n{"a": {"c": 1}}\n{"a": {"c": "x"}}\n',
            "line 3: expected a to",
        ),
    ],
)
def test_rows_that_say_less_or_more_than_they_seem_are_refused(
    name: str, text: str, message: str, tmp_path: Path
):
    with pytest.raises(UserError, match=message) as caught:
        read_texts_of(tmp_path, {name: text})
    assert len(str(caught.value)) < 400


def test_a_column_of_numbers_that_pandas_adds_is_no_matter(tmp_path: Path):
    trained = read_texts_of(
        tmp_path, {"a.csv": ",prompt,completion\n0,a,01234\n1,b,\n2,c,NA\n"}, "data.max_dropped=0.5"
    )
    assert [x.count("01234") + x.count("NA") for x in trained] == [1, 1]
