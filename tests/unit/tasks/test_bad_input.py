"""What a user can put right is told in one line, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from heads import labelled_rows, write_head_config, write_rows

from fedex_scale.cli import main
from fedex_scale.runtime.errors import UserError

ROWS = labelled_rows(12)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head_config(tmp_path_factory.mktemp("bad"), run={"name": "bad"})


def told(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Return the one line on stderr of a run that must not begin."""
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--config", str(config), *overrides])
    assert stopped.value.code == 2
    assert not (config.parent / "runs/bad").exists()
    lines = capsys.readouterr().err.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) == begin + 1, lines
    return lines[begin]


def without(key: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != key} for row in ROWS]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (without("label"), "expected a column label, got text, size"),
        (without("text"), "expected a column text, got label, size"),
        ([row | {"label": "fruit"} for row in ROWS], "at least two labels to train on, got 1"),
        ([row | {"label": None} for row in ROWS[:2]] + ROWS, "column label is empty in 2 rows"),
    ],
)
def test_rows(rows, expected: str, config: Path, tmp_path: Path, capsys) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert expected in told(config, capsys, f"data.path={file}")


def test_labels_unseen_in_training(config: Path, tmp_path: Path, capsys) -> None:
    rows = [row | {"label": "tools"} for row in ROWS[:1]] + ROWS
    file = write_rows(tmp_path / "rows.jsonl", rows)
    line = told(config, capsys, f"task.test={file}")
    assert "expected labels among 'fruit', 'money', got 'tools'" in line
    line = told(config, capsys, f"data.path={file}", "task.labels=[fruit, money]")
    assert "got 'tools'; take these rows out, or name all labels in task.labels" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.kind=regress"], "expected numbers in column label, got 'fruit' in row 1"),
        (["task.test=nowhere.jsonl"], "found none at nowhere.jsonl"),
        (["task.holdout=0.2"], "task.test names the rows already"),
        (["task.holdout_by=text"], "expected a task.holdout as well"),
        (["task.text_columns=[a, b, c]"], "expected one column or two, got 3"),
        (["task.head=[nose]"], "expected names of modules in roberta, got nose"),
        (["evaluation.tasks=[fedex_gsm8k]"], "lm-eval scores models that write"),
        (["task.kind=generate"], "task.kind generate needs columns"),
        (["task.kind=instruct"], "instruct is scored by evaluation.tasks"),
        (["train.packing=true"], "classify reads one example a row"),
        (["task.labels=[a, a]"], "a label is there twice"),
        (["task.kind=images"], "is of type roberta, which has no ForImageClassification"),
        (["task.kind=clasify"], "did you mean classify?"),
    ],
)
def test_settings(overrides: list[str], expected: str, config: Path, capsys) -> None:
    assert expected in told(config, capsys, *overrides)


def test_a_model_without_the_class(config: Path, tiny_llama: Path, capsys) -> None:
    line = told(config, capsys, f"model.path={tiny_llama}", "task.kind=images")
    assert "is of type llama, which has no ForImageClassification; choose another model" in line


def test_a_weight_that_would_stay_as_drawn_is_no_base(config: Path, tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file, save_file
    from tiny import make_roberta

    model = make_roberta(tmp_path / "model")
    file = model / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    line = told(config, capsys, f"model.path={model}", "lora.target_modules=[query]")
    assert "expected every weight but the head's in the files" in line
    assert "layer.1.output.dense.weight" in line


def test_another_head_than_the_run_began_with(config: Path, tmp_path: Path) -> None:
    from fedex_scale.federation.directory import check_head
    from fedex_scale.files.adapters import Adapter
    from fedex_scale.run import run_config

    run = run_config(config, ["run.name=begun", "federation.rounds=1", "evaluation.before=false"])
    adapter = Adapter(run / "server/round-0000/adapter")
    shapes = {
        name.removeprefix("base_model.model."): s for name, (_, s) in adapter.full_specs().items()
    }
    check_head(adapter, shapes)
    shapes["classifier.out_proj.bias"] = (3,)
    with pytest.raises(UserError, match=r"classifier\.out_proj\.bias \(2,\).*got \(3,\)"):
        check_head(adapter, shapes)


def test_an_encoders_tokenizer_needs_no_end_token(config: Path, tmp_path: Path) -> None:
    """As BERT's: texts of a pair are told apart by their types."""
    from tiny import make_roberta
    from transformers import AutoTokenizer

    from fedex_scale.run import run_config

    tokenizer = AutoTokenizer.from_pretrained(make_roberta(tmp_path / "model"))
    tokenizer.eos_token = None
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    changes = [f"model.path={tmp_path / 'model'}", "run.name=pairs", "federation.rounds=1"]
    rows = [{"a": row["text"], "b": "Fruit?", "label": row["label"]} for row in ROWS]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    changes += [f"data.path={file}", "task.text_columns=[a, b]", f"task.test={file}"]
    assert (run_config(config, changes) / "final/adapter").is_dir()
