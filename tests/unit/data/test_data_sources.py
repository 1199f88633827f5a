from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from fedex_scale.config.learning import DataConfig
from fedex_scale.data import sources
from fedex_scale.data.prompts import schema_of
from fedex_scale.data.sources import load_rows
from fedex_scale.runtime.errors import UserError

ROWS = [{"query": f"q{i}", "response": f"r{i}", "type": "ab"[i % 2]} for i in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.delenv("FEDEX_SCALE_DATA", raising=False)


def write(rows: list[dict], path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_local_files(tmp_path: Path, suffix: str):
    path = write(ROWS, tmp_path / f"rows{suffix}")
    assert load_rows(DataConfig(path=path), 0).to_list() == ROWS


def test_a_glob_reads_files_in_the_order_of_their_names(tmp_path: Path):
    write(ROWS[6:], tmp_path / "b" / "train.json")
    write(ROWS[:6], tmp_path / "a" / "train.json")
    assert load_rows(DataConfig(path=f"{tmp_path}/*/train.json"), 0).to_list() == ROWS


@pytest.mark.parametrize("by", ["field", "environment"])
def test_local_stands_in_for_the_hub(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch):
    write(ROWS, tmp_path / "math" / "train.jsonl")
    fields = {"path": "meta-math/MetaMathQA", "local": "math/train.jsonl"}
    if by == "field":
        fields["data_dir"] = str(tmp_path)
    else:
        monkeypatch.setenv("FEDEX_SCALE_DATA", str(tmp_path))
    assert len(load_rows(DataConfig(**fields), 0)) == 10


def test_a_hub_id_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load(*args: object, **kwargs: object) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_list([{"question": "q", "answer": "#### 1"}])

    monkeypatch.setattr(sources, "load_dataset", load)
    load_rows(DataConfig(path="openai/gsm8k", name="main", schema="gsm8k"), 0)
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


def test_an_unreachable_hub_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch):
    def load(*args: object, **kwargs: object) -> Dataset:
        raise RuntimeError("outer") from ConnectionError("no route\nto host")

    monkeypatch.setattr(sources, "load_dataset", load)
    config = DataConfig(path="zwhe99/commonsense_170k", local="commonsense/*/train.json")
    with pytest.raises(UserError, match=r"commonsense_170k \(no route\).*data_dir to where") as e:
        load_rows(config, 0)
    assert "\n" not in str(e.value)


def test_first_and_random_rows(tmp_path: Path):
    path = write(ROWS, tmp_path / "rows.jsonl")
    first = load_rows(DataConfig(path=path, num_examples=3), 0)
    assert first.to_list() == ROWS[:3]

    def drawn(seed: int) -> list[str]:
        config = DataConfig(path=path, num_examples=5, select="random")
        return load_rows(config, seed)["query"][:]

    assert drawn(1) == drawn(1) == sorted(set(drawn(1)))
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_named_columns(tmp_path: Path):
    path = write([{"mr": "name[Blue]", "ref": "Blue is a pub."}], tmp_path / "e2e.csv")
    config = DataConfig(path=path, schema="columns", prompt_column="mr", response_column="ref")
    assert len(load_rows(config, 0)) == 1
    assert (schema_of(config).instruction, schema_of(config).response) == ("mr", "ref")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_examples": 0}, "expected a whole number from 1 to 1,000,000,000"),
        ({"max_length": 0}, "expected a whole number from 1 to 1,000,000,000"),
        ({"schema": "columns"}, "expected both"),
        ({"schema": "columns", "prompt_column": "a"}, "expected both"),
        ({"prompt_column": "a", "response_column": "b"}, "neither with another"),
        ({"data_dir": "somewhere"}, "data.local"),
    ],
)
def test_fields_that_do_not_fit(fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        DataConfig(path="rows.json", **fields)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("notes.txt", "expected a .json.*got notes.txt; convert it"),
        ("absent.json", "found none at absent.json"),
        ("/absent/*.jsonl", "found none at"),
        ("/absent/rows", "expected a .json"),
    ],
)
def test_paths_that_are_neither_data_nor_hub_ids(path: str, message: str):
    with pytest.raises(UserError, match=message):
        load_rows(DataConfig(path=path), 0)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (ROWS, {"schema": "gsm8k"}, "needs a column question, got query, response, type"),
        (ROWS, {"num_examples": 11}, "at most the 10 rows"),
        ([], {}, "at least one row"),
        (
            [{"instruction": "i", "input": "x", "output": "o"}],
            {"schema": "commonsense"},
            "every input to be empty",
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list, fields: dict, message: str):
    path = write(rows, tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=message) as caught:
        load_rows(DataConfig(path=path, **fields), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl", "bad.parquet", "latin.csv"])
def test_a_broken_file(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\xff\xfe{not, \x80 data")
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        load_rows(DataConfig(path=str(tmp_path / name)), 0)
    assert "\n" not in str(caught.value)


def test_an_empty_list_is_no_data(tmp_path: Path):
    path = write([], tmp_path / "rows.json")
    with pytest.raises(UserError, match=r"rows\.json"):
        load_rows(DataConfig(path=path), 0)


def test_texts_of_json_are_what_stands_in_the_file(tmp_path: Path):
    texts = ["2003-05-05", "2003-05-05T10:00:00Z", "01234", "1e3", "NA", " x\n"]
    rows = [
        {"prompt": text, "completion": "2003-05-05", "turns": [{"content": text}]} for text in texts
    ]
    for suffix in (".json", ".jsonl"):
        read = load_rows(DataConfig(path=write(rows, tmp_path / f"rows{suffix}")), 0)
        assert read.to_list() == rows


def test_a_changed_file_of_json_is_read_anew(tmp_path: Path):
    for rows in (ROWS, ROWS[:4]):
        assert len(load_rows(DataConfig(path=write(rows, tmp_path / "rows.jsonl")), 0)) == len(rows)


@pytest.mark.parametrize("value", [1.5, True])
def test_what_json_spells_in_several_ways_is_no_text(value: object):
    with pytest.raises(UserError, match=r"expected text in completion, got .* in quotes"):
        schema_of(DataConfig(path="x"), "prompt_completion").texts(
            {"prompt": "a", "completion": value}
        )


def test_cells_of_csv_are_what_stands_in_the_file(tmp_path: Path):
    cells = ["01234", "1.50", "1e3", "NA", "None", "null", "nan", "True", ""]
    rows = [{"prompt": "a", "completion": cell} for cell in cells]
    read = load_rows(DataConfig(path=write(rows, tmp_path / "rows.csv")), 0)
    assert read["completion"][:] == [cell or None for cell in cells]


@pytest.mark.parametrize("cell", ["\ud800", ["x", {"y\udfff": 1}]])
def test_half_a_character_is_told_with_its_line(tmp_path: Path, cell: object):
    path = write([*ROWS, ROWS[0] | {"response": cell}], tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows.jsonl: line 11: expected characters, got half"):
        load_rows(DataConfig(path=path), 0)


def test_a_column_that_comes_late_is_kept_and_a_number_that_does_is_told(tmp_path: Path):
    rows = [*ROWS * 150, ROWS[0] | {"tools": "[]"}]
    assert load_rows(DataConfig(path=write(rows, tmp_path / "a.jsonl")), 0)[-1] == rows[-1]
    rows = [*ROWS * 150, ROWS[0] | {"response": 1e3}]
    with pytest.raises(UserError, match=r"b.jsonl: line 1501: expected response to be as in"):
        load_rows(DataConfig(path=write(rows, tmp_path / "b.jsonl")), 0)
