"""What a run's files tell of it, gathered as plain data: the run's report.json.

Written by the run after each round, and gathered anew by `fedex-scale report`, so that a run that
did not finish tells what there is.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedex_scale
from fedex_scale.aggregation import communication
from fedex_scale.config.federation import MethodConfig
from fedex_scale.config.section import to_dict
from fedex_scale.files import checked, kinds
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import DEVIATION_FILE, RunDir
from fedex_scale.methods.all import METHODS
from fedex_scale.reporting.samples import samples
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError, reading
from fedex_scale.runtime.outputs import write_file
from fedex_scale.runtime.scores import best_round

FORMAT = 1
REPORT_FILE = "report.json"
PACKAGES = "torch transformers peft deepspeed lm_eval datasets accelerate".split()


def facts(**known: Any) -> dict[str, Any]:
    """Return what no file of a run tells: versions, the machine, and what the caller knows."""
    versions = {"fedex_scale": fedex_scale.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions, "machine": platform.machine(), "began": began, **known}


def write(run: RunDir, known: Mapping[str, Any]) -> None:
    """Write the run's report.json; a run that goes on keeps the time of its beginning."""
    file, now = run.path / REPORT_FILE, datetime.now(timezone.utc).isoformat(timespec="seconds")
    known = {**known, "began": _began(file) or known.get("began", now), "updated": now}
    text = json.dumps(gather(run, known), indent=1) + "\n"
    write_file(file, text)


def _began(file: Path) -> str | None:
    """Return when the run began, as an earlier report.json says, if it can be read."""
    try:
        began = door.read_json(file, "")["facts"]["began"]
    except (OSError, UserError, LookupError, TypeError):
        return None
    return began if isinstance(began, str) else None


def gather(run: RunDir, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all that is known of a run, finished or not.

    Args:
        known: `facts` of the running run; none: those in its report.json, if there is one.

    Raises:
        UserError: no run directory, or a file in it that cannot be read.
    """
    config = to_dict(run.config())
    with reading(run.path, "restore the files of this run"):
        return _gather(run, config, known)


def _gather(run: RunDir, config: dict[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    if known is None:
        file = run.path / REPORT_FILE
        known = checked.read(kinds.ReportFile, file).facts.model_dump() if file.exists() else {}
    events = kinds.events(run.metrics)
    rounds = [_round(run, number) for number in range(1, run.rounds_done() + 1)]
    planned = config["federation"]["rounds"]
    return {
        "format": FORMAT,
        "name": run.path.resolve().name,
        "finished": any((run.final / name).is_dir() for name in ("adapter", "model")),
        "rounds_done": len(rounds),
        "rounds_planned": planned,
        "config": config,
        "facts": dict(known),
        "partition": checked.read(kinds.PartitionFile, run.path / "partition.json").model_dump(),
        "scores": (scores := _scores(run)),
        "best": _best(scores),
        "samples": samples(run),
        "steps": _of(events, "step"),
        "held_out": _of(events, "held_out"),
        "clients": _of(events, "client"),
        "failures": _of(events, "failure"),
        "rounds": rounds,
        "phases": _of(events, "phases"),
        "seconds": events[-1]["seconds"] if events else 0.0,
        "communication": _communication(run, config, known),
    }


def _of(events: list[dict], name: str) -> list[dict]:
    return [{k: v for k, v in x.items() if k != "event"} for x in events if x["event"] == name]


def _round(run: RunDir, number: int) -> dict[str, Any]:
    """Return what was aggregated in a round, and how far averaging would have deviated."""
    report = run.round(number).model_dump()
    file = run.server(number) / DEVIATION_FILE
    note = "not recorded by the version that ran this"
    found: dict[str, Any] = {"note": note, "total": None, "layers": []}
    if file.exists():
        found = checked.read(kinds.DeviationFile, file).model_dump()
    return {
        "round": number,
        **{k: v for k, v in report.items() if k != "layers"},
        "deviation": found,
    }


def _scores(run: RunDir) -> list[dict[str, Any]]:
    """Return the scores with standard errors, by round and task, as lm-eval computed them."""
    scores = []
    for file in sorted(run.path.glob("evaluations/round-*/results.json")):
        number = file.parent.name.removeprefix("round-")
        if not (number.isascii() and number.isdigit()):
            continue
        round = int(number)
        results = checked.read(kinds.ResultsFile, file, finite=False)
        for task, metrics in results.results.items():
            for key, value in metrics.items():
                metric, _, rule = key.partition(",")
                if not _is_number(value) or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{rule}")
                number = results.n_samples.get(task, {}).get("effective")
                scores.append(
                    {
                        "round": round,
                        "task": task,
                        "metric": metric if rule in ("", "none") else f"{metric}/{rule}",
                        "value": value,
                        "stderr": error if _is_number(error) else None,
                        "examples": number if type(number) is int else None,
                    }
                )
    return scores


def _best(scores: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the best round of each score and its value, where several rounds were scored."""
    by_round: dict[str, dict[int, float]] = {}
    for score in scores:
        if score["round"]:
            name = f"{score['task']}/{score['metric']}"
            by_round.setdefault(name, {})[score["round"]] = score["value"]
    best = {name: best_round(name, own) for name, own in by_round.items() if len(own) > 1}
    return {name: {"round": k, "value": by_round[name][k]} for name, k in best.items()}


def _communication(
    run: RunDir, config: Mapping[str, Any], known: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the traffic of the run's method first, then of those that people compare with."""
    if not (run.adapter(0) / "adapter_config.json").is_file():
        return []
    server = Adapter(run.adapter(0))
    federation, method = config["federation"], MethodConfig(**config["method"])
    fraction, population = federation["client_fraction"], config["partition"]["num_clients"]
    single = METHODS[method.name].one_client
    settings = {
        "rank": config["lora"]["rank"],
        "num_clients": 1 if single else max(1, int(fraction * population + 0.5)),
        "rounds": federation["rounds"],
        "initial": known.get("base_parameters", 0),
        "head": known.get("head_parameters", 0),
        "initial_dtype_bytes": 4 if known.get("dtype") == "float32" else 2,
    }
    shapes = {layer: server.shapes(layer) for layer in server.layers}
    own = communication.traffic(shapes, method=method, **settings)
    if own.method == communication.FULL:
        return [own.as_dict() | {"label": communication.label(own)}]
    settings["num_clients"] = max(1, int(fraction * population + 0.5))
    others = communication.compare(shapes, methods=("fedit", "ffa", "fedex"), **settings)
    rows = [own, *(row for row in others if row != own)]
    return [row.as_dict() | {"label": communication.label(row)} for row in rows]


def _is_number(value: object) -> bool:
    return isinstance(value, float) and abs(value) <= 1e300
