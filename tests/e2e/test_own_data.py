"""A user's own files, from the rows to what is told of them: one run, looked at from all sides."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT
from peft import PeftModel
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from fedex_scale.cli import main

HELD_OUT = [{"prompt": f"{i} pens?", "completion": f" {i + 1} pens"} for i in (71, 82, 93)]
PROMPTS = ["12 apples?", "Is | the `sky` <b>blue</b>?"]
TASK = {
    "task": "my_sums",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{completion}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
    "metric_list": [{"metric": "exact_match"}],
}


def command(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (0, None)


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the config of a run of two sites, done."""
    folder = tmp_path_factory.mktemp("own")
    for name, number in (("north", 8), ("south", 5)):
        rows = [{"prompt": f"{i} apples?", "completion": f" {i} pens"} for i in range(number)]
        write(folder / "sites" / f"{name}.jsonl", rows)
    with (folder / "sites" / "south.jsonl").open("a") as file:
        file.write('{"prompt": "3", "completion": ""}\n')
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS), encoding="utf-8")
    (folder / "tasks").mkdir()
    files = {"data_files": {"test": str(write(folder / "test.jsonl", HELD_OUT))}}
    (folder / "tasks" / "my.yaml").write_text(yaml.safe_dump(TASK | {"dataset_kwargs": files}))
    settings = {
        "run": {"name": "own", "dir": str(folder / "runs")},
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "lora": {"rank": 4},
        "data": {"holdout": str(folder / "test.jsonl"), "max_dropped": 0.1},
        "partition": {"kind": "sites", "files": [f"{folder}/sites/*"]},
        "federation": {"rounds": 2},
        "train": {"batch_size": 2, "micro_batch_size": 2, "learning_rate": 0.01},
        "evaluation": {
            "generate": str(folder / "prompts.txt"),
            "include_path": str(folder / "tasks"),
            "tasks": ["my_sums"],
        },
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command("run", "--config", path)
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    return config.parent / "runs" / "own"


def events(run: Path, name: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def loss_of(model: torch.nn.Module) -> float:
    """Return the mean loss over the completions' tokens and end tokens, a row after another."""
    tokenizer, total, count = make_tokenizer(), 0.0, 0
    for row in HELD_OUT:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        number = len(ids) - len(prompt)
        total, count = total + float(loss) * number, count + number
    return total / count


def test_the_held_out_loss_is_that_of_what_is_handed_over(run: Path, tiny_llama: Path) -> None:
    before, after = events(run, "held_out")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert before["loss"] == pytest.approx(loss_of(base), rel=1e-5)
    model = PeftModel.from_pretrained(base, run / "final" / "adapter").eval()
    assert after["loss"] == pytest.approx(loss_of(model), rel=1e-5)
    assert after["loss"] < before["loss"] - 0.1
    for look in (before, after):
        assert look["perplexity"] == pytest.approx(math.exp(look["loss"]))
        assert look["clients"] == {"test.jsonl": look["loss"]}
        assert look["examples"] == 3


def test_answers_stand_side_by_side(run: Path) -> None:
    given = [
        [json.loads(line) for line in (run / f"evaluations/round-{n:04d}/answers.jsonl").open()]
        for n in (0, 2)
    ]
    for answers in given:
        assert [row["prompt"] for row in answers] == PROMPTS
        assert any(row["answer"] for row in answers)
    page = (run / "answers.md").read_text(encoding="utf-8").splitlines()
    assert page.count("| before training | after round 2 |") == 2
    assert "## 2. Is &#124; the &#96;sky&#96; &lt;b&gt;blue&lt;/b&gt;?" in page
    rows = [line for line in page if line.startswith("| ") and "before training" not in line]
    assert [line.count("|") for line in rows] == [3, 3]


def test_the_report_and_the_card_tell_of_rows_sites_and_loss(run: Path) -> None:
    command("report", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in ("north", "south", "held-out loss", "1 empty, of 14 rows"):
        assert words in page
    before, after = events(run, "held_out")
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "| rows not trained whole | 1 empty, of 14 rows |" in card
    assert f"held-out examples | {before['loss']:.4f} before, {after['loss']:.4f} after |" in card
    assert "| data | `north, south`, 13 examples, a client per file" in card
    entries = json.loads((run / "partition.json").read_text())["clients"]
    assert [(entry["name"], entry["num_examples"]) for entry in entries] == [
        ("north", 8),
        ("south", 5),
    ]


def test_tasks_of_ones_own_run_their_code_for_who_asks_only(
    run: Path, config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert [sorted(key for key in look if "/" in key) for look in events(run, "eval")] == [
        ["my_sums/exact_match"]
    ] * 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--out", str(tmp_path / "refused")])
    assert ended.value.code == 2
    assert "unknown task my_sums" in capsys.readouterr().err
    mine = config.parent / "tasks"
    command("evaluate", run, "--include-path", mine, "--out", tmp_path / "scored")
    scored = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert "my_sums" in scored["results"]


def test_a_preview_needs_no_weights(
    config: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_llama.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, tmp_path)
    capsys.readouterr()
    command("data", "--config", config, "-n", "1", f"model.path={tmp_path}")
    told = capsys.readouterr().out
    for words in ("is prompt_completion (prompt, completion)", "1 of 14 rows", "north", "61.5%"):
        assert words in told
    assert "0 apples?⟦ 0 pens</s>⟧" in told


def test_the_docs_first_steps_as_written(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a file of chats and an empty directory: at most five lines and two commands."""
    page = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
    settings, row = (
        page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("yaml", "json")
    )
    commands = page.partition("```\n```\n")[2].partition("```")[0]
    lines = [line for line in settings.splitlines() if not line.startswith("#")]
    asked = [line.partition("#")[0].split() for line in commands.splitlines()]
    assert len(lines) <= 5
    assert [words[:2] for words in asked] == [["fedex-scale", "data"], ["fedex-scale", "run"]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.yaml").write_text(settings)
    (tmp_path / "chats.jsonl").write_text(row * 150)
    (tmp_path / "prompts.txt").write_text("Is the shop open?\n")
    model = [f"model={{path: {tiny_llama}, dtype: float32}}", "data.chat_template=zephyr"]
    for _, *words in asked:
        command(*words, *model)
    told = capsys.readouterr().out
    assert "chats.jsonl is chat (messages)" in told
    assert "answers: runs/chats/answers.md" in told
    assert "⟦Yes, from nine to six.</s>⟧" in told
    for when in ("before training", "after round 1"):
        assert f"{when}: held-out loss" in told
    done = tmp_path / "runs" / "chats"
    assert (done / "final" / "adapter" / "adapter_model.safetensors").is_file()
    template = (done / "final" / "chat_template.jinja").read_text()
    assert template == json.loads((done / "partition.json").read_text())["chat_template"]
    assert "Is the shop open?" in (done / "answers.md").read_text()
