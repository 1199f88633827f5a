"""What was run: settings, data and versions, from a run's record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from fedex_scale.reporting import headers
from fedex_scale.reporting.chart import Record
from fedex_scale.reporting.words import Table, count, rows_told, table


def in_one_line(run: Record) -> str:
    """Return what was run: method, model, clients, rounds."""
    config = run["config"]
    clients, rounds = config["partition"]["num_clients"], config["federation"]["rounds"]
    return (
        f"{method_of(run)} on {Path(config['model']['path']).name}: {count(clients, 'client')}, "
        f"{count(rounds, 'round')}, LoRA rank {config['lora']['rank']}"
    )


def facts(records: Sequence[Record]) -> Table:
    """Return what was run, a column a run."""
    columns = [_facts(run) for run in records]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(["", *(run["name"] for run in records)], rows) | {"facts": True, "wide": True}


def data(records: Sequence[Record]) -> list[Table]:
    """Return who had which examples."""
    found = []
    for run in records:
        parts = run["partition"]["clients"]
        kinds = list(dict.fromkeys(kind for part in parts for kind in part.get("counts") or {}))
        if len(kinds) > 12:
            kinds = []
        rows = [
            [
                part.get("name") or f"client {k}",
                f"{part['num_examples']:,}",
                *(f"{(part.get('counts') or {}).get(kind, 0):,}" for kind in kinds),
            ]
            for k, part in enumerate(parts[:50])
        ]
        more = f" The first 50 of {len(parts)}." if len(parts) > 50 else ""
        whose = f"{run['name']}: " if len(records) > 1 else ""
        about = f"{whose}examples of each client.{more}"
        about_kinds = dict.fromkeys(kinds, "Of these, with this value of partition.column.")
        columns = headers.DATA | about_kinds
        found.append(table(["", "examples", *kinds], rows, caption=about, about=columns))
        if all(other["partition"] == run["partition"] for other in records):
            found[-1]["caption"] = f"Examples of each client.{more}"
            break
    return found


def yaml_of(run: Record) -> str:
    return yaml.safe_dump(run["config"], sort_keys=False)


def method_of(run: Record) -> str:
    method = run["config"]["method"]
    assign = f", assign: {method['assign']}" if method.get("assign", "average") != "average" else ""
    svd = f", svd_rank {method['svd_rank']}" if method.get("svd_rank") else ""
    return method["name"] + assign + svd


def _facts(run: Record) -> dict[str, str]:
    config, known = run["config"], run["facts"]
    lora, train, federation = config["lora"], config["train"], config["federation"]
    partition, source = config["partition"], config["data"]
    examples = sum(part["num_examples"] for part in run["partition"]["clients"])
    versions = known.get("versions", {})
    machine = f"{known['ranks']} x {known['device']}" if "ranks" in known else "not recorded"
    deepspeed = (config.get("engine") or {}).get("deepspeed")
    return {
        "model": f"{config['model']['path']}, {known.get('dtype', config['model']['dtype'])}",
        "method": f"{method_of(run)}, fold: {config['aggregate']['fold']}",
        "adapter": f"rank {lora['rank']}, alpha {lora['alpha']:g}, "
        + _listed(lora["target_modules"]),
        "data": f"{source['path'] or 'files'}: {examples:,} examples of at most "
        f"{source['max_length']} tokens",
        "rows left out or cut": rows_told(run["partition"]) or "none",
        "clients": f"{partition['num_clients']}, {partition['kind']}"
        + (f", alpha {partition['alpha']:g}" if partition["kind"].startswith("dirichlet") else "")
        + (f", {federation['client_fraction']:.0%} a round" * (federation["client_fraction"] < 1)),
        "rounds": f"{federation['rounds']}, with {count(train['local_epochs'], 'local epoch')}, "
        f"init: {federation['init']}",
        "training": f"{train['optimizer']}, {train['schedule']} from {train['learning_rate']:g}, "
        f"batches of {train['batch_size']}",
        "began": _date(known.get("began")),
        "last written": _date(known.get("updated")),
        "seed": str(config["run"]["seed"]),
        "machine": f"{machine}, {Path(deepspeed).stem if deepspeed else 'plain PyTorch'}",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) or "not recorded",
    }


def _date(text: str | None) -> str:
    """Return a time as people write it: 2026-11-24 22:41 UTC."""
    return "not recorded" if text is None else f"{text[:16].replace('T', ' ')} UTC"


def _listed(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
