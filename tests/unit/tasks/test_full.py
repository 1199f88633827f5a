"""Federated full fine-tuning: every weight is trained and averaged, and there is no adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import NUM_TRAIN, labelled_rows, write_head_config
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fedex_scale.api import aggregate, export
from fedex_scale.config.load import load_config
from fedex_scale.files.run_dir import RunDir
from fedex_scale.planning.choice import make_plan
from fedex_scale.planning.machine import this_machine
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError

LABELS = {"fruit": 0, "money": 1}
FULL = ["method.name=full", "train.learning_rate=1e-3", "train.max_grad_norm=0"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head_config(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def run(config: Path) -> RunDir:
    steps = ["train.batch_size=50", "train.micro_batch_size=50", "train.local_epochs=3"]
    return RunDir(run_config(config, [*FULL, *steps, "train.schedule=constant"]))


def weights_of(run: RunDir, number: int) -> dict[str, torch.Tensor]:
    found = load_file(run.adapter(number) / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): x for name, x in found.items()}


def test_a_round_is_fedavg_of_a_plain_loop(run: RunDir, config: Path) -> None:
    start, rows = weights_of(run, 0), labelled_rows(NUM_TRAIN)
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "roberta")
    mean: dict[str, torch.Tensor] = {}
    for part in np.array_split(np.arange(NUM_TRAIN), 3):
        model = AutoModelForSequenceClassification.from_pretrained(config.parent / "roberta")
        assert not model.load_state_dict(start, strict=False).unexpected_keys
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        texts = [rows[i]["text"] for i in part]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = torch.tensor([LABELS[rows[i]["label"]] for i in part])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.0 if step == 0 else 1e-3  # the first warms up
            model.train()
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, weight in model.named_parameters():
            mean[name] = mean.get(name, 0) + weight.detach().double() * len(part) / NUM_TRAIN
    server = weights_of(run, 1)
    assert server.keys() == mean.keys() == start.keys()
    for name, weight in mean.items():
        torch.testing.assert_close(server[name], weight.float(), rtol=0, atol=2e-5)
    assert not torch.equal(
        server["roberta.encoder.layer.0.output.dense.weight"],
        start["roberta.encoder.layer.0.output.dense.weight"],
    )


def test_what_is_handed_over_is_a_model(run: RunDir) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(run.final / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.final / "model")
    lines = (run.evaluation(2) / "samples.jsonl").read_text().splitlines()
    texts = [row["text"] for row in labelled_rows(32)[NUM_TRAIN:]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    got = [model.config.id2label[i] for i in logits.argmax(1).tolist()]
    assert got == [json.loads(line)["answer"] for line in lines]
    report = json.loads((run.path / "report.json").read_text())
    size = sum(x.numel() for x in weights_of(run, 0).values())
    assert report["finished"]
    (row,) = report["communication"]
    assert (row["method"], row["up"], row["down"]) == ("full", size, size)
    with pytest.raises(UserError, match="final/model is the model"):
        export(run.path, run.path / "out")


def test_a_language_model_with_tied_weights(tiny_gpt2: Path, tmp_path: Path) -> None:
    rows = [{"query": f"Tom has {i} apples.", "response": f"The answer is: {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tree = {
        "run": {"dir": str(tmp_path / "runs")},
        "model": {"path": str(tiny_gpt2), "dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "partition": {"num_clients": 2},
        "train": {"batch_size": 2, "learning_rate": 1e-3},
        "method": {"name": "full"},
    }
    run = RunDir(run_config(tree, []))
    model = AutoModelForCausalLM.from_pretrained(run.final / "model")
    server = weights_of(run, 1)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, server[name]), name
    before = AutoModelForCausalLM.from_pretrained(tiny_gpt2).transformer.wte.weight
    assert not torch.equal(model.transformer.wte.weight, before)


def test_a_plan_counts_every_weight(config: Path, run: RunDir) -> None:
    plan = make_plan(load_config(config, FULL), this_machine())
    size = sum(x.numel() for x in weights_of(run, 0).values())
    assert plan.weights.trained == size
    assert plan.traffic.up == plan.traffic.down == size


def test_without_adapters_there_is_nothing_to_aggregate(run: RunDir, config: Path) -> None:
    clients = [run.client(1, client) for client in range(3)]
    out = run.path / "aggregated"
    with pytest.raises(UserError, match="client-0000: expected LoRA weights, found none"):
        aggregate(clients, base=config.parent / "roberta", out=out)
    assert not out.exists()
