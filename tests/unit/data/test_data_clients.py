"""Every row is trained, held out, or told of; each client has its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from own_rows import RECOGNISED, TOKENIZER, config, pairs, read, texts, write

from fedex_scale.config.places import check_places
from fedex_scale.data.clients import read_clients
from fedex_scale.data.preview import show
from fedex_scale.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_schema_is_recognised_and_told_in_one_line(name: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [RECOGNISED[name]] * 3)
    settings = {"chat_template": "zephyr"} if name == "chat" else {}
    clients = read(data={"path": path, **settings})
    assert clients.schema == clients.report["schema"] == name
    assert f"rows.jsonl is {name} (" in clients.notes[0]
    *of_columns, note = read(data={"path": path, "schema": name, **settings}).notes
    assert note.startswith("held out: none, as that takes a client of 50 examples")
    left = {"alpaca": "text", "prompt_completion": "id", "metamath": "type"}.get(name)
    assert of_columns == ([f"data: not used of its columns: {left}"] if left else [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b", "answer": "c"}, "may be alpaca or commonsense; set"),
        ({"question": "a", "answer": "b"}, "got columns question, answer, which no schema is"),
        ({"conversation": "a"}, "no schema is known by; set data.schema, or columns with"),
        ({"messages": '[{"role": "user"}]'}, "got columns messages, whose turns are a text; write"),
        ({"prompt;completion": "a;b"}, "as its cells are divided by semicolons; save it with com"),
    ],
)
def test_columns_that_leave_a_doubt(row: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        read(data={"path": write(tmp_path / "rows.jsonl", [row] * 3)})


def test_a_row_of_another_schema_is_told_with_its_line(tmp_path: Path):
    rows = [*pairs(3), {"instruction": "a", "output": "b"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl: line 7: expected prompt and completion"):
        read(data={"path": str(path)})


def test_other_characters_and_endings_are_told(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes("prompt,completion\na,b\na,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"rows.csv: line 3: expected UTF-8, got the byte 0xe9"):
        read(data={"path": str(tmp_path / "rows.csv")})
    with pytest.raises(UserError, match=r"rows.JSONL; rename it to .jsonl, or name"):
        read(data={"path": write(tmp_path / "rows.JSONL", pairs(3))})


def test_a_list_is_no_text(tmp_path: Path):
    turns = RECOGNISED["chat"]["messages"]
    lists = {"prompt": turns[:1], "completion": turns[1:]}
    for settings in (
        {"schema": "prompt_completion"},
        {"schema": "columns", "prompt_column": "prompt", "response_column": "completion"},
    ):
        for rows, told in (
            ([lists], r"line 1: expected text in completion, got \[{"),
            ([*pairs(3), lists], r"line 4: expected prompt to be as in the rows before it"),
        ):
            with pytest.raises(UserError, match=told):
                read(data={"path": write(tmp_path / "rows.jsonl", rows), **settings})


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        ("alpaca", "auto", "### Instruction:\na\n\n### Response:b</s>"),
        ("alpaca", "none", "ab</s>"),
        ("prompt_completion", "auto", "ab</s>"),
        ("prompt_completion", "alpaca", "### Instruction:\na\n\n### Response:b</s>"),
        ("text", "auto", "a b c</s>"),
    ],
)
def test_what_is_put_around(row: str, template: str, text: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [RECOGNISED[row]] * 3)
    ((one, *_), *_) = texts(read(data={"path": path, "template": template}).train)
    assert one.endswith(text)
    assert one.startswith("Below is" if "###" in text else text)


def test_a_chat_template_without_a_chat_is_told(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(UserError, match=r"data.chat_template: rows .* set data.template=chat"):
        read("data.chat_template=zephyr", data={"path": path})
    asked = "data.chat_template=zephyr", "data.template=chat"
    ((one, *_), *_) = texts(read(*asked, data={"path": path}).train)
    assert one == "<|user|>\n0 apples?</s>\n<|assistant|>\n 0 pens</s>\n"


def test_alpaca_with_and_without_an_input(tmp_path: Path):
    rows = [{"instruction": "a", "input": x, "output": "b"} for x in ("12", "", None)]
    path = write(tmp_path / "rows.jsonl", rows)
    with_input, without, null = texts(read("partition.kind=contiguous", data={"path": path}).train)
    assert "further context." in with_input[0]
    assert "### Input:\n12\n\n### Response:b</s>" in with_input[0]
    assert without == null
    assert "### Instruction:\na\n\n### Response:b</s>" in without[0]


def test_rows_that_are_not_trained_whole_are_counted_and_told(tmp_path: Path):
    long = {"prompt": "12 apples?", "completion": " 12 pens" * 30}
    too_long = {"prompt": "12 apples? " * 30, "completion": "12"}
    empty = [{"prompt": "1", "completion": " "}, {"prompt": None, "completion": "2"}]
    rows = [*pairs(36), long, too_long, *empty]
    path = write(tmp_path / "rows.jsonl", rows)
    asked = "data.max_length=60", "data.max_dropped=0.1"
    clients = read(*asked, data={"path": path})
    told = clients.report
    counts = [told[what] for what in ("rows", "empty", "dropped", "truncated")]
    assert counts == [40, 2, 1, 1]
    assert sum(map(len, clients.train)) == 37
    line = clients.notes[1]
    assert "4 of 40 rows are left out or cut: 2 empty, 1 with no room" in line
    assert f"1 cut there, so that their end is not learned (the longest has {told['longest']}" in (
        line
    )
    whole = read(f"data.max_length={told['longest']}", data={"path": path})
    assert [whole.report[what] for what in ("dropped", "truncated")] == [0, 0]
    with pytest.raises(UserError, match=r"4 of 40 .* at most data.max_dropped=0.05 .*=0.1 goes on"):
        read("data.max_length=60", data={"path": path})


def test_a_site_is_a_client_of_its_name(tmp_path: Path):
    write(tmp_path / "north.jsonl", pairs(5))
    write(tmp_path / "south" / "b.jsonl", pairs(2, 50))
    write(tmp_path / "south" / "a.jsonl", pairs(1, 40))
    partition = {"kind": "sites", "files": [f"{tmp_path}/*"]}
    assert config(partition=partition).partition.num_clients == 2
    clients = read(partition=partition)
    assert clients.names == ["north", "south"]
    assert [[text.split()[0] for text in part] for part in texts(clients.train)] == [
        ["0", "1", "2", "3", "4"],
        ["40", "50", "51"],
    ]
    entries = clients.report["clients"]
    assert [(x["client"], x["name"], x["num_examples"]) for x in entries] == [
        (0, "north", 5),
        (1, "south", 3),
    ]
    assert entries[0]["sha256"] != entries[1]["sha256"]
    assert clients.notes[1] == "clients, with their examples: north 5, south 3"
    merged = read("method.name=centralized", partition=partition)
    assert [len(part) for part in merged.train] == [8]


def test_a_site_that_is_not_there_is_named(tmp_path: Path):
    there = write(tmp_path / "a.jsonl", pairs(3))
    partition = {"kind": "sites", "files": [there, str(tmp_path / "typo.jsonl")]}
    with pytest.raises(UserError, match=r"found none at .*typo.jsonl; correct it") as caught:
        read(partition=partition)
    with pytest.raises(UserError, match=re.escape(str(caught.value))):
        check_places(config("model.path=org/base", partition=partition))


def test_several_files_that_are_pooled_are_told(tmp_path: Path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", pairs(4))
    clients = read(data={"path": f"{tmp_path}/*.jsonl"})
    assert (
        "3 files are pooled, and their rows dealt out anew (partition.kind=iid)"
        in (clients.notes[1])
    )


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        (["a/t.jsonl", "b/t.jsonl"], (), r"two sites of the name t, .*a/t.jsonl and .*b/t.jsonl"),
        (["a", "empty.jsonl"], (), r"empty.jsonl: expected at least one row, got none"),
        (["a", "bare"], (), r"bare: expected a .json.* file in it, found none; take the site out"),
        (["nowhere*"], (), r"expected a file or directory, found none"),
        (["a", "text.jsonl"], (), r"a is prompt_completion, but .*text.jsonl is text"),
        (["a", "b"], ("partition.num_clients=5",), r"\(2 at .*got 5; leave it out"),
        (["a", "b"], ("data.path=x.jsonl",), "data.path: expected left out with partition.files"),
        (["a", "b"], ("data.num_examples=3",), "data.num_examples: takes rows of all data"),
        (["a", "b"], ("partition.kind=iid",), "partition.files: expected files with kind: sites"),
    ],
)
def test_sites_that_cannot_be(files: list, overrides: tuple, message: str, tmp_path: Path):
    for name in "ab":
        write(tmp_path / name / "t.jsonl", pairs(4))
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "text.jsonl", [{"text": "a"}])
    (tmp_path / "bare").mkdir()
    partition = {"kind": "sites", "files": [str(tmp_path / file) for file in files]}
    with pytest.raises(UserError, match=message) as caught:
        read(*overrides, partition=partition)
    assert "\n" not in str(caught.value)


def test_held_out_rows_are_the_clients_own_and_nobody_trains_on_them(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", pairs(300))
    whole = read("data.holdout=0", data={"path": path})
    assert not whole.held_out
    for override, count in (("data.holdout=0.1", 10), ("data.holdout=auto", 2)):
        clients = read(override, data={"path": path})
        assert [len(part) for part in clients.held_out.values()] == [count] * 3
        assert [entry["held_out"] for entry in clients.report["clients"]] == [count] * 3
        held_out = list(clients.held_out.values())
        for client in range(3):
            trained, held = (texts(part)[client] for part in (clients.train, held_out))
            assert not set(trained) & set(held)
            assert set(trained) | set(held) == set(texts(whole.train)[client])
            order = [text for text in texts(whole.train)[client] if text in set(trained)]
            assert trained == order
        again = read(override, data={"path": path})
        assert texts(again.held_out.values()) == texts(held_out)
    assert texts(read("run.seed=1", data={"path": path}).held_out.values()) != texts(held_out)


@pytest.mark.parametrize(
    ("overrides", "count", "why"),
    [
        (("evaluation.tasks=[fedex_gsm8k]",), 0, None),
        (("train.max_steps=2", "train.batch_size=25"), 1, None),
        (("train.max_steps=1", "train.batch_size=25"), 0, "a round 25; set data.holdout=0.1"),
        (("partition.num_clients=7",), 0, "the largest has 43; set data.holdout=0.1"),
    ],
)
def test_by_default_few_rows_are_held_out(
    overrides: tuple, count: int, why: str | None, tmp_path: Path
):
    path = write(tmp_path / "rows.jsonl", pairs(300))
    clients = read(*overrides, data={"path": path})
    held = clients.held_out
    assert [len(part) for part in held.values()] == [count] * (len(held) if count else 0)
    assert bool(held) == bool(count)
    told = [note for note in clients.notes if note.startswith("held out: none")]
    assert (why in told[0]) if why else not told
    assert not read(*overrides, "data.holdout=0", data={"path": path}).notes[1:]


def test_a_file_of_held_out_rows(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", pairs(6))
    apart = write(tmp_path / "apart.jsonl", pairs(2, 70))
    clients = read(f"data.holdout={apart}", data={"path": path})
    assert [len(part) for part in clients.train] == [2, 2, 2]
    assert list(clients.held_out) == ["apart.jsonl"]
    ((one, _),) = texts(clients.held_out.values())
    assert one.startswith("70 apples?")
    more = write(tmp_path / "apart.jsonl", [*pairs(30, 70), {"prompt": "a", "completion": ""}])
    changed = read(f"data.holdout={more}", data={"path": path})
    assert changed.report["held_out"] != clients.report["held_out"]
    assert "data.holdout: 1 of 31 rows are left out or cut: 1 empty" in changed.notes
    other = write(tmp_path / "other.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"other.jsonl: data.schema=prompt_completion needs"):
        read(f"data.holdout={other}", data={"path": path})


def test_a_share_that_leaves_a_client_nothing(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", pairs(7))
    with pytest.raises(UserError, match=r"data.holdout: client 0 has 3 examples, and holding out"):
        read("data.holdout=0.9", data={"path": path})


def test_the_preview_shows_what_is_trained(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", pairs(120))
    settings = config("data.holdout=0.1", data={"path": path})
    clients = read_clients(settings, TOKENIZER)
    *told, table, head, example = show(clients, settings, TOKENIZER, 1, color=False)
    assert told[:-1] == clients.notes
    assert told[-1].startswith("120 rows of schema prompt_completion: 0 empty, 0 without room")
    first = [next(iter(column.cells)) for column in table.columns]
    assert first[:4] == ["client 0", "36", "33.3%", "4"]
    assert "client 0, example 1" in head
    text = texts(clients.train)[0][0]
    prompt = text[: text.index("?") + 1]
    assert example.plain == f"{prompt}⟦{text.removeprefix(prompt)}⟧"
    *_, coloured = show(clients, settings, TOKENIZER, 1, color=True)
    assert coloured.plain == text
    assert [str(span.style) for span in coloured.spans] == ["bold green"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n\n{bad\n', "line 3: not valid JSON"),
        ('{"text": "ok"}\n{"text": "caf\xe9"}\n'.encode("latin-1"), "line 2: expected UTF-8, got"),
        (b'{"text": "ok"}\n[1]\n', r"line 2: expected a row with named columns, got \[1\]"),
        (b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "line 1: nested too deep"),
        (b'{"text": "ok"}\n{"text": "' + b"x" * 11_000_000 + b'"}\n', "line 2: expected at most"),
        (b'{"text": "ok"}\n{"text": "' + b"x" * 1_100_000 + b'"}\n', "line 2: .*1,000,000 char"),
        (b"\n\n", "expected at least one row, got none"),
    ],
)
def test_a_broken_line_is_told_by_its_number(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"rows.jsonl: {message}") as caught:
        read(data={"path": str(tmp_path / "rows.jsonl")})
    assert len(str(caught.value)) < 400


def test_keys_that_come_late_in_a_large_file(tmp_path: Path):
    """`datasets` decides on the columns of a turn by the first megabytes."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    late = [{**turn, "weight": 1} for turn in turns]
    note = "x" * 100_000
    rows = [{"messages": turns, "note": note}] * 120
    path = write(tmp_path / "rows.jsonl", [*rows, {"messages": late, "note": note}])
    clients = read("data.holdout=0", data={"path": path, "chat_template": "zephyr"})
    assert clients.report["rows"] == 121
    assert np.unique(np.concatenate([part.lengths for part in clients.train])).size == 1


def test_a_held_out_file_that_is_trained_is_refused_by_name(tmp_path: Path):
    one, two = (write(tmp_path / f"{name}.jsonl", pairs(4)) for name in "ab")
    sites = {"kind": "sites", "files": [str(tmp_path / "*.jsonl")]}
    for sections in ({"data": {"path": one}}, {"partition": sites}):
        with pytest.raises(UserError, match=r"data.holdout: expected a file that .*a.jsonl"):
            read(f"data.holdout={one}", **sections)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.jsonl").symlink_to(two)
    with pytest.raises(UserError, match=r"b.jsonl is of two sites, b and c; give it to one"):
        read(partition={"kind": "sites", "files": [two, str(tmp_path / "c")]})


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (0.5, r"line 2: turn 2: expected a weight of 0 or 1, got 0.5"),
        (0, "line 2: .* weight 0 only"),
    ],
)
def test_weights_of_answers(weight: float, message: str, tmp_path: Path):
    user, answer = RECOGNISED["chat"]["messages"]
    rows = [[user, answer], [user, answer | {"weight": weight}]]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns} for turns in rows])
    with pytest.raises(UserError, match=message):
        read(data={"path": path, "chat_template": "zephyr"})
