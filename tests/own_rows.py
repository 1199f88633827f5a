"""Rows of a user's own, written to files, and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tiny import make_tokenizer

from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.data.batching import Examples
from fedex_scale.data.clients import Clients, read_clients

TOKENIZER = make_tokenizer()


def pairs(number: int, begin: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"{i} apples?", "completion": f" {i} pens"} for i in range(begin, begin + number)
    ]


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(*overrides: str, **sections: dict) -> Config:
    return load_config({"model": {"path": "m"}, **sections}, overrides)


def read(*overrides: str, **sections: dict) -> Clients:
    return read_clients(config(*overrides, **sections), TOKENIZER)


def texts(clients: Iterable[Examples]) -> list[list[str]]:
    return [[TOKENIZER.decode(part[i]["input_ids"]) for i in range(len(part))] for part in clients]


RECOGNISED = {
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "text": "a b"},
    "prompt_completion": {"prompt": "a", "completion": "b", "id": 3},
    "metamath": {"query": "a", "response": "b", "type": "x"},
    "gsm8k": {"question": "a", "answer": "b\n#### 2"},
    "text": {"text": "a b c"},
}
