"""Small runs to interrupt, and what must be alike when they have gone on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fedex_scale.data.word_problems import generate, write_jsonl


def write_config(model: Path, folder: Path, **sections: dict) -> Path:
    """Write a config of two rounds of three clients with three steps each, and its data."""
    train, heldout = generate(0, train=30, heldout=4)
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(heldout, folder / "heldout.jsonl")
    config = {
        "run": {"dir": str(folder / "runs"), "save_steps": 2},
        "model": {"path": str(model), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"path": str(folder / "train.jsonl"), "max_length": 512},
        "federation": {"rounds": 2},
        "train": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.001},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def assert_same_result(one: Path, other: Path) -> None:
    """Compare all that a run leaves, byte by byte; only times may differ."""
    assert differing(one, other) == []


def differing(one: Path, other: Path) -> list[str]:
    """Return what two runs left that is not alike; times may differ."""
    found = []
    for part in ("server", "final", "evaluations", "clients"):
        mine, theirs = files(one / part), files(other / part)
        found += [x for x in mine.keys() | theirs.keys() if mine.get(x) != theirs.get(x)]
    return found + ["metrics.jsonl"] * (events(one) != events(other))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in ("results.json", "client.json")  # hold times
    }


def events(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "took_s")}
        for line in lines
        if line["event"] != "phases"  # nothing but times
    ]
