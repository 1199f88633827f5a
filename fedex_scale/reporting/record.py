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

import yaml

import fedex_scale
from fedex_scale.aggregation import communication
from fedex_scale.config.federation import MethodConfig
from fedex_scale.files.adapters import Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.all import METHODS
from fedex_scale.reporting.samples import samples
from fedex_scale.runtime.errors import UserError, reading
from fedex_scale.runtime.outputs import write_file

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
        began = json.loads(file.read_text(encoding="utf-8"))["facts"]["began"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return began if isinstance(began, str) else None


def gather(run: RunDir, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all that is known of a run, finished or not.

    Args:
        known: `facts` of the running run; none: those in its report.json, if there is one.

    Raises:
        UserError: no run directory, or a file in it that cannot be read.
    """
    config = _read_config(run)
    with reading(run.path, "restore the files of this run"):
        return _gather(run, config, known)


def _gather(run: RunDir, config: dict[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    if known is None:
        file = run.path / REPORT_FILE
        known = _read_json(file).get("facts", {}) if file.is_file() else {}
    events = _read_events(run)
    rounds = [_round(run, number) for number in _rounds_done(run)]
    planned = config["federation"]["rounds"]
    return {
        "format": FORMAT,
        "name": run.path.resolve().name,
        "finished": (run.final / "adapter").is_dir(),
        "rounds_done": len(rounds),
        "rounds_planned": planned,
        "config": config,
        "facts": dict(known),
        "partition": _read_json(run.path / "partition.json", "clients"),
        "scores": _scores(run),
        "samples": samples(run),
        "steps": _of(events, "step"),
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
    needed = ("kept", "ideal_norm", "residual_norm", "largest_layer")
    report = _read_json(run.server(number) / "aggregate.json", *needed)
    file = run.server(number) / "deviation.json"
    note = "not recorded by the version that ran this"
    deviation = {"note": note, "total": None, "layers": []}
    return {
        "round": number,
        **{k: v for k, v in report.items() if k != "layers"},
        "deviation": _read_json(file, *deviation) if file.is_file() else deviation,
    }


def _rounds_done(run: RunDir) -> list[int]:
    done = []
    while (run.server(len(done) + 1) / "aggregate.json").is_file():
        done.append(len(done) + 1)
    return done


def _scores(run: RunDir) -> list[dict[str, Any]]:
    """Return the scores with standard errors, by round and task, as lm-eval computed them."""
    scores = []
    for file in sorted(run.path.glob("evaluations/round-*/results.json")):
        results = _read_json(file, "results")
        round = int(file.parent.name.removeprefix("round-"))
        for task, metrics in results["results"].items():
            for key, value in metrics.items():
                metric, _, rule = key.partition(",")
                if not isinstance(value, float) or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{rule}")
                number = results.get("n-samples", {}).get(task, {}).get("effective")
                scores.append(
                    {
                        "round": round,
                        "task": task,
                        "metric": metric if rule in ("", "none") else f"{metric}/{rule}",
                        "value": value,
                        "stderr": error if isinstance(error, float) else None,
                        "examples": number,
                    }
                )
    return scores


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
        "initial_dtype_bytes": 4 if known.get("dtype") == "float32" else 2,
    }
    shapes = {layer: server.shapes(layer) for layer in server.layers}
    own = communication.traffic(shapes, method=method, **settings)
    settings["num_clients"] = max(1, int(fraction * population + 0.5))
    others = communication.compare(shapes, methods=("fedit", "ffa", "fedex"), **settings)
    rows = [own, *(row for row in others if row != own)]
    return [row.as_dict() | {"label": communication.label(row)} for row in rows]


def _read_config(run: RunDir) -> dict[str, Any]:
    try:
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        sections = ("model", "lora", "data", "partition", "federation", "method", "train")
        if all(isinstance(config[section], dict) for section in sections):
            return config
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    raise UserError(
        f"{run.path}: expected a run directory with its config.yaml, found none; name a directory "
        "that fedex-scale run made, such as runs/quickstart"
    )


def _read_events(run: RunDir) -> list[dict[str, Any]]:
    """Return the events; a last line that was cut off is left out."""
    events = []
    lines = run.metrics.read_text(encoding="utf-8").splitlines() if run.metrics.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{run.metrics}: line {number} is not JSON; restore it") from None
    return events


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return a JSON object that has these keys."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON ({error}); restore this file of the run") from None
    missing = [key for key in keys if not isinstance(tree, dict) or key not in tree]
    if missing:
        raise UserError(f"{path}: expected {', '.join(missing)}, got none; restore this file")
    return tree
