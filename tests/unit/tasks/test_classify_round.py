"""A round with a head, done again by a plain loop of transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import NUM_TRAIN, labelled_rows, write_head_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_scheduler,
)

from fedex_scale.files.run_dir import RunDir
from fedex_scale.run import run_config

EPOCHS, CLIENTS, LR = 4, 3, 0.01
LABELS = {"fruit": 0, "money": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two rounds, in each of which a step takes all of a client's examples."""
    config = write_head_config(tmp_path_factory.mktemp("classify"))
    changes = [f"train.local_epochs={EPOCHS}", "train.batch_size=50", "train.micro_batch_size=3"]
    changes += ["train.schedule=linear", "train.warmup_ratio=0.25", "train.max_grad_norm=0"]
    return RunDir(run_config(config, changes))


def load(run: RunDir, adapter: Path, **options) -> PeftModel:
    base = run.path.parents[1] / "roberta"
    config = AutoConfig.from_pretrained(base, num_labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    return PeftModel.from_pretrained(model, adapter, **options)


def train(model: PeftModel, rows: list[dict]) -> None:
    """Train as the paper's recipe says, with the libraries' own loss and schedule."""
    model.train()
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().config.name_or_path)
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([LABELS[row["label"]] for row in rows])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=EPOCHS)
    for _ in range(EPOCHS):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def test_a_round_is_what_plain_libraries_make_of_it(run: RunDir) -> None:
    rows = labelled_rows(NUM_TRAIN)
    parts = np.array_split(np.arange(NUM_TRAIN), CLIENTS)
    assert len({len(part) for part in parts}) > 1, "weights must differ"
    mean: dict[str, torch.Tensor] = {}
    for client, part in enumerate(parts):
        model = load(run, run.adapter(0), is_trainable=True)
        train(model, [rows[i] for i in part])
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = load_file(run.client(1, client) / "adapter_model.safetensors")
        assert len(theirs) == len(trained)
        for name, weight in trained.items():
            key = name.replace(".default", "").replace(".modules_to_save", "")
            torch.testing.assert_close(theirs[key], weight.detach(), rtol=0, atol=1e-5)
            mean[key] = mean.get(key, 0) + weight.detach().double() * len(part) / NUM_TRAIN
    server = load_file(run.adapter(1) / "adapter_model.safetensors")
    start = load_file(run.adapter(0) / "adapter_model.safetensors")
    assert server.keys() == mean.keys()
    for key, weight in mean.items():
        torch.testing.assert_close(server[key], weight.float(), rtol=0, atol=1e-5)
        assert not torch.equal(server[key], start[key]), key
    assert sum("classifier" in key for key in server) == 4


def test_what_is_handed_over_answers_as_it_was_scored(run: RunDir) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        run.path.parents[1] / "roberta", config=AutoConfig.from_pretrained(run.final)
    )
    assert base.config.id2label == {0: "fruit", 1: "money"}
    tokenizer = AutoTokenizer.from_pretrained(run.path.parents[1] / "roberta")
    file = run.evaluation(2) / "samples.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [row["text"] for row in labelled_rows(32)[NUM_TRAIN:]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    for name in ("adapter", "exact_adapter"):
        model = PeftModel.from_pretrained(base, run.final / name).eval()
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        got = [base.config.id2label[i] for i in logits.argmax(1).tolist()]
        assert got == [sample["answer"] for sample in samples]
        base = model.unload()
    results = json.loads((run.evaluation(2) / "results.json").read_text())["results"]
    right = [sample["answer"] == sample["target"] for sample in samples]
    assert results["classify"]["accuracy,none"] == pytest.approx(np.mean(right))


def test_the_head_counts_in_what_travels(run: RunDir) -> None:
    report = json.loads((run.path / "report.json").read_text())
    size = sum(
        x.numel()
        for n, x in load_file(run.adapter(0) / "adapter_model.safetensors").items()
        if "classifier" in n
    )
    assert report["facts"]["head_parameters"] == size
    assert {row["head"] for row in report["communication"]} == {size}
