"""Texts from tables: what is trained, what is written, and a whole run on GPT-2's architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from fedex_scale.config.task import TaskSection
from fedex_scale.files.run_dir import RunDir
from fedex_scale.run import run_config
from fedex_scale.tasks import generate
from fedex_scale.tasks.interface import causal_loss

ROWS = [
    {"mr": f"name[{name}], food[{food}], area[{{riverside}}]", "ref": text}
    for name, food in (("Aromi", "French"), ("Zizzi", "pub food"), ("Bibimbap House", "Thai"))
    for text in (f"{name} has {food}.", f"There is {food} at {name}, by the river.")
]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("generate")
    config = {
        "run": {"dir": str(folder / "runs")},
        "model": {"path": str(tiny_gpt2), "dtype": "float32"},
        "lora": {"rank": 2, "target_modules": ["c_attn"]},
        "task": {
            "kind": "generate",
            "test": write_rows(folder / "test.jsonl", ROWS[:4]),
            "label_smoothing": 0.1,
            "num_beams": 3,
            "max_new_tokens": 8,
        },
        "data": {
            "path": write_rows(folder / "train.jsonl", ROWS),
            "schema": "columns",
            "prompt_column": "mr",
            "response_column": "ref",
        },
        "partition": {"num_clients": 2},
        "train": {"batch_size": 2, "local_epochs": 2},
        "evaluation": {"batch_size": 2},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return RunDir(run_config(file, []))


def test_a_run_is_scored_against_all_references_of_a_prompt(run: RunDir) -> None:
    lines = (run.evaluation(1) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["prompt"] for sample in samples] == [ROWS[0]["mr"], ROWS[2]["mr"]]
    assert [sample["target"] for sample in samples] == [
        [row["ref"] for row in ROWS[i : i + 2]] for i in (0, 2)
    ]
    results = json.loads((run.evaluation(1) / "results.json").read_text())
    assert {"bleu,none", "nist,none"} <= results["results"]["generate"].keys()
    assert results["n-samples"]["generate"]["effective"] == 2


def test_smoothed_loss_is_the_librarys(tiny_gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (3, 9), generator=draw)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    trained = int((labels[:, 1:] != -100).sum())
    logits = model(input_ids=ids).logits
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels, shift_labels=True)
    got = generate.smoothed_loss(0.1, model, batch, trained)
    torch.testing.assert_close(got, expected)
    none = generate.smoothed_loss(0.0, model, batch, trained)
    torch.testing.assert_close(none, causal_loss(model, batch, trained))


def test_a_text_does_not_depend_on_who_is_in_its_batch(tiny_gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    tokenizer = make_tokenizer()
    for section in (
        TaskSection(kind="generate", num_beams=4, max_new_tokens=12),
        TaskSection(kind="generate", num_beams=1, max_new_tokens=12, no_repeat_ngram=0),
    ):
        rows = Dataset.from_list([ROWS[0], {"mr": "name[X]", "ref": "X."}, ROWS[4]])
        task = generate._prompts(section, tokenizer, rows, ["mr", "ref"])
        assert len({len(tokens) for tokens in task.tokens}) == 3
        with torch.no_grad():
            together = generate.write(task, model, [0, 1, 2])
            alone = [generate.write(task, model, [i])[0] for i in range(3)]
        assert together == alone
        assert len(set(alone)) > 1


def test_the_prompt_is_put_around_the_row_as_it_is(run: RunDir) -> None:
    """Braces in a row or a prompt are no places to be filled."""
    tokenizer = make_tokenizer()
    section = TaskSection(kind="generate", prompt="{{}} {x} ->".replace("{{}}", "{}"))
    task = generate._prompts(section, tokenizer, Dataset.from_list(ROWS[:1]), ["mr", "ref"])
    assert tokenizer.decode(task.tokens[0]) == f"{ROWS[0]['mr']} {{x}} ->"
    assert generate._escaped("{x} ->").format(instruction="?") == "{x} ->"
