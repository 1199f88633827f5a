"""A federation of three sites on disk, and the simulation that it has to equal."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fedex_scale.data.word_problems import generate

NUM_SITES = 3


def write_federation(
    model: Path, folder: Path, *, num_sites: int = NUM_SITES, **sections: dict
) -> Path:
    """Write sites' data and configs, the server's and the simulation's; return the folder.

    simulation.yaml has all rows and splits them by site, site-K.yaml its own, server.yaml none.
    """
    rows, _ = generate(0, train=30, heldout=4)
    cuts = [0, 8, 19, 30]
    shared = {
        "model": {"path": str(model), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.001},
        "federation": {"rounds": 2},
        **sections,
    }
    told = []
    for k in range(num_sites):
        own = [{**row, "site": f"site-{k}"} for row in rows[cuts[k] : cuts[k + 1]]]
        told += own
        _write_rows(folder / f"site-{k}.jsonl", own)
        site = {
            **shared,
            "run": {"name": f"site-{k}", "dir": str(folder / "sites"), "save_steps": 1},
            "data": {"path": str(folder / f"site-{k}.jsonl")},
            "site": {"number": k},
        }
        _write(folder / f"site-{k}.yaml", site)
    _write_rows(folder / "all.jsonl", told)
    natural = {"kind": "natural", "column": "site", "num_clients": num_sites}
    data = {"path": str(folder / "all.jsonl")}
    run = {"name": "simulation", "dir": str(folder)}
    _write(folder / "simulation.yaml", {**shared, "run": run, "data": data, "partition": natural})
    _write(folder / "server.yaml", {**shared, "partition": {"num_clients": num_sites}})
    return folder


def _write(path: Path, tree: dict) -> None:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
