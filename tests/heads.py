"""Small runs that train a head: a few sentences with a label that can be told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from tiny import make_roberta

NUM_TRAIN, NUM_TEST = 22, 10


def labelled_rows(count: int, seed: int = 0) -> list[dict]:
    """Return sentences that speak of apples or of coins, and say which."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        fruit = number % 2 == 0
        thing, verb = ("apples", "buys") if fruit else ("coins", "spent")
        text = f"Tom has {draw.randint(1, 99)} {thing} and {verb} {draw.randint(1, 99)} more."
        rows.append({"text": text, "label": "fruit" if fruit else "money", "size": number / 7})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_head_config(folder: Path, **sections: dict) -> Path:
    """Write a tiny RoBERTa, its rows, and a config of two rounds of three clients."""
    model = folder / "roberta"
    if not model.exists():
        make_roberta(model)
    rows = labelled_rows(NUM_TRAIN + NUM_TEST)
    train = write_rows(folder / "train.jsonl", rows[:NUM_TRAIN])
    test = write_rows(folder / "test.jsonl", rows[NUM_TRAIN:])
    config = {
        "run": {"dir": str(folder / "runs"), "save_steps": 2, "overwrite": True},
        "model": {"path": str(model), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 8, "target_modules": ["query", "value"]},
        "task": {"kind": "classify", "test": str(test)},
        "data": {"path": str(train), "max_length": 64},
        "partition": {"kind": "contiguous"},
        "federation": {"rounds": 2},
        "train": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path = folder / "head.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
