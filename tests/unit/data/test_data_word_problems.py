from __future__ import annotations

import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest

from fedex_scale.data.answers import correct_number, paper_number
from fedex_scale.data.word_problems import FAMILIES, generate, main
from fedex_scale.runtime.errors import UserError

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def value(expression: str) -> int:
    """Compute `a * b + c` and the like from left to right; no product comes after a sum here."""
    total, *rest = re.split(r" ([-+*/]) ", expression)
    result = int(total)
    for operation, number in zip(rest[::2], rest[1::2], strict=True):
        result = OPERATIONS[operation](result, int(number))
    return result


def test_the_working_is_right_and_ends_in_the_answer():
    train, heldout = generate(0, train=600, heldout=60)
    for row in train + heldout:
        working, answer = row["response"].split(".\nThe answer is: ")
        assert {value(side) for side in working.split(" = ")} == {int(answer)}
        assert int(answer) >= 1
        assert working.endswith(f" = {answer}")
        assert paper_number(row["response"]) == correct_number(row["response"]) == int(answer)


def test_the_working_uses_the_numbers_of_the_question():
    for row in generate(0, train=600, heldout=1)[0]:
        expression = row["response"].split(" = ")[0]
        assert re.findall(r"\d+", expression) == re.findall(r"\d+", row["query"])


def test_the_answer_must_be_computed():
    """Copying a number out of the question is seldom right by chance."""
    rows, _ = generate(0, train=600, heldout=1)
    copied = sum(
        row["response"].rsplit(" ", 1)[1] in re.findall(r"\d+", row["query"]) for row in rows
    )
    assert copied < 0.06 * len(rows)


def test_no_query_twice_and_every_family_alike():
    train, heldout = generate(1, train=601, heldout=60)
    queries = [row["query"] for row in train + heldout]
    assert len(set(queries)) == len(queries)
    for rows in (train, heldout):
        counts = Counter(row["type"] for row in rows)
        assert set(counts) == {family.__name__ for family in FAMILIES}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_depend_on_the_seed_and_not_on_how_many_there_are():
    train, heldout = generate(2, train=50, heldout=20)
    more_train, same_heldout = generate(2, train=80, heldout=20)
    assert same_heldout == heldout
    assert more_train[:50] == train
    assert generate(3, train=50, heldout=20) != (train, heldout)


@pytest.mark.parametrize("counts", [{"train": 0, "heldout": 1}, {"train": 1, "heldout": 0}])
def test_at_least_one_row(counts: dict):
    with pytest.raises(UserError, match="at least 1"):
        generate(0, **counts)


def test_more_than_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedex_scale.data.word_problems.NAMES", ["Ada", "Ben"])
    monkeypatch.setattr("fedex_scale.data.word_problems.ITEMS", ["eggs"])
    with pytest.raises(UserError, match="ask for fewer"):
        generate(0, train=20_000, heldout=1)


def test_the_command_writes_both_files_and_nothing_else(tmp_path: Path):
    out = tmp_path / "new" / "words"
    assert main(["--out", str(out), "--train", "7", "--heldout", "5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert rows == generate(0, train=7, heldout=5)[0]


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
