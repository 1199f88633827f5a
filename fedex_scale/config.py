"""One YAML a run: read, checked and resolved into frozen dataclasses.

A section that belongs to one module is defined beside that module; this file holds the rest and
composes them. Every value can be overridden on the command line as `section.key=value`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fedex_scale.adapters import LoraSection
from fedex_scale.aggregator import AggregateSection
from fedex_scale.client import TrainSection
from fedex_scale.data.partition import PartitionConfig
from fedex_scale.data.sources import DataConfig
from fedex_scale.ds_config import EngineSection
from fedex_scale.errors import UserError
from fedex_scale.evaluation import EvaluationSection
from fedex_scale.methods import MethodConfig
from fedex_scale.models import ModelSection


@dataclass(frozen=True, kw_only=True)
class RunSection:
    name: str = "run"
    """Name of the run; its directory is `dir/name`."""
    dir: str = "runs"
    """Where run directories are made."""
    seed: int = 0
    """Everything random is drawn from (seed, round, client) and nothing else."""
    overwrite: bool = False
    """Delete an existing run directory of this name first."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint of this name, if there is one; as --resume does."""
    keep: int = 3
    """Checkpoints to keep."""
    save_steps: int | None = 50
    """Steps of a client between checkpoints; none: only when a client or a round is done."""
    trackers: tuple[str, ...] = ()
    """Any of tensorboard, wandb, trackio; through accelerate's trackers."""
    profile_steps: tuple[int, ...] = ()
    """Steps of which to write a torch profiler trace, counted from 1 as the program starts."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"run.keep: expected at least 1, got {self.keep}")
        if self.save_steps is not None and self.save_steps < 1:
            raise UserError(f"run.save_steps: expected at least 1 or none, got {self.save_steps}")
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"run.name: expected a plain name, got {self.name!r}; try my_run")
        if any(step < 1 for step in self.profile_steps):
            raise UserError(
                f"run.profile_steps: expected numbers from 1, got {list(self.profile_steps)}"
            )
        known = ("tensorboard", "wandb", "trackio")
        for tracker in self.trackers:
            if tracker not in known:
                raise UserError(f"run.trackers: expected any of {', '.join(known)}, got {tracker}")
            if importlib.util.find_spec(tracker) is None:
                raise UserError(f"run.trackers: {tracker} is not installed; pip install {tracker}")

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass(frozen=True, kw_only=True)
class FederationSection:
    rounds: int = 1
    """Rounds of train-and-aggregate."""
    client_fraction: float = 1.0
    """Share of the clients that train in a round, drawn anew each round (at least one)."""
    init: Literal["shared", "per_client"] = "shared"
    """First A: one draw for all clients (the paper, eq. 10) or one a client (its public code)."""
    weights: Literal["num_examples", "uniform"] = "num_examples"
    """A client's weight in the averages."""
    on_client_failure: Literal["stop", "skip", "retry"] = "stop"
    """A client whose loss or adapter is NaN or Inf: stop the run, leave the client out of the
    round, or train it once more with another seed and stop if that fails, too."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"federation.rounds: expected at least 1, got {self.rounds}")
        if not 0 < self.client_fraction <= 1:
            raise UserError(
                "federation.client_fraction: expected a number above 0 and at most 1, "
                f"got {self.client_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A resolved run. Each field is one section of the YAML."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataConfig
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    federation: FederationSection = field(default_factory=FederationSection)
    method: MethodConfig = field(default_factory=MethodConfig)
    aggregate: AggregateSection = field(default_factory=AggregateSection)
    train: TrainSection = field(default_factory=TrainSection)
    engine: EngineSection = field(default_factory=EngineSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        problems = []
        if self.method.name == "centralized" and self.federation.client_fraction < 1:
            problems.append("federation.client_fraction: centralized has one client; leave it at 1")
        if self.method.name == "ffa" and self.federation.init == "per_client":
            problems.append("federation.init: ffa shares one frozen A; use init: shared")
        if self.method.assign == "keep":
            problems.append(
                "method.assign: keep gives each client a base of its own, which one engine cannot "
                "hold; use average, or fedex-scale aggregate --assign keep on a round's clients"
            )
        if self.model.quantization != "none" and self.aggregate.fold != "side":
            problems.append(
                f"aggregate.fold: a {self.model.quantization} base cannot take a residual, "
                f"got fold: {self.aggregate.fold}; use fold: side"
            )
        if problems:
            raise UserError("; ".join(problems))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check everything.

    Raises:
        UserError: no such file, not a mapping, an unknown key, a value of the wrong type. All
            problems that can be seen at once are named at once.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config: cannot read {path} ({error.strerror}); name a file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections (run, model, ...), got {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    problems: list[str] = []
    config = _build(Config, tree, "", problems)
    if problems:
        raise UserError("; ".join(problems))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Return the resolved config as plain data that YAML and JSON can hold."""
    return {
        f.name: to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _apply_override(tree: dict, override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override: expected section.key=value, got {override!r}")
    *sections, key = keys.strip().split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"override: {section} in {override!r} is a value and not a section")
    try:
        node[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[key] = text


def _build(cls: type, tree: Any, where: str, problems: list[str]) -> Any:
    """Return an instance of a config dataclass, or None after adding to `problems`."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        problems.append(f"{where}: expected a section with keys, got {tree!r}")
        return None
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            problems.append(f"{name}: unknown key; {hint}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, name, problems)
        else:
            values[key] = _convert(value, hints[key], name, problems)
    for f in known.values():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in tree:
            problems.append(
                f"{where + '.' if where else ''}{f.name}: missing; add it to the config"
            )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except UserError as error:
        problems.append(str(error))
        return None


def _convert(value: Any, hint: Any, name: str, problems: list[str]) -> Any:
    """Return `value` as the annotated type; YAML reads 5e-4 as text, so numbers are parsed."""
    for option in _options(hint):
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        listed = typing.get_origin(option) is tuple and isinstance(value, (list, tuple))
        if listed and all(isinstance(item, typing.get_args(option)[0]) for item in value):
            return tuple(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if option is str and isinstance(value, str):
            return value
        if option is dict and isinstance(value, dict):
            return value
    problems.append(f"{name}: expected {_describe(hint)}, got {value!r}")
    return value


def _options(hint: Any) -> tuple:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _describe(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if typing.get_origin(option) is Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is tuple:
            item = {int: "whole numbers", str: "text"}[typing.get_args(option)[0]]
            names.append(f"a list of {item}")
        else:
            plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
            names.append(plain.get(option, "nothing" if option is type(None) else str(option)))
    return " or ".join(names)
