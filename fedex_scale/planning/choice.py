"""`fedex-scale plan`: what a config needs with each DeepSpeed file, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedex_scale.aggregation.communication import Traffic, traffic
from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config
from fedex_scale.config.shipped import names_of
from fedex_scale.engine import models
from fedex_scale.engine.ds_config import read_settings
from fedex_scale.federation.client import num_steps
from fedex_scale.methods.all import METHODS
from fedex_scale.planning import footprint
from fedex_scale.planning.columns import Side
from fedex_scale.planning.footprint import Weights, Work
from fedex_scale.planning.machine import Machine, this_machine
from fedex_scale.planning.plan import PLAIN, Estimate, estimate
from fedex_scale.rounds import choose_clients
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks.all import kind_without_rows

TITLES = {"gpu": "each GPU", "host": "host RAM", "nvme": "NVMe", "disk": "disk"}
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` tells.

    Fields:
        chosen: of the config as it stands.
        others: of every DeepSpeed file, the chosen one included.
        remedy: the change that makes the config fit at the least cost in time; None where it
            fits, or nothing helps.
        steps: of a client in a round; None where the number of rows is not known.
        clients: of a round.
        side: what the side adapter costs over the rounds.
    """

    config: Config
    machine: Machine
    weights: Weights
    work: Work
    chosen: Estimate
    others: tuple[Estimate, ...]
    remedy: str | None
    steps: int | None
    clients: int
    side: str | None
    traffic: Traffic


def make_plan(config: Config, machine: Machine) -> Plan:
    """Plan a run. Nothing is loaded, and no weights are needed.

    Raises:
        UserError: the model's config or the DeepSpeed file cannot be read.
    """
    machine = _with_nvme(config, machine)
    sizes = Sizes(config, machine)
    given, config = config, sizes.filled(config)
    chosen = sizes.estimate(config)
    remedy = None
    if not chosen.fits:
        remedy = _cheapest(config, machine, sizes)
    files = {PLAIN: None, **{name: name for name in names_of("ds_configs")}}
    own = config.engine.deepspeed
    files[Path(own).stem if own else PLAIN] = own
    others = [
        sizes.estimate(sizes.filled(replace(given, engine=replace(given.engine, deepspeed=file))))
        for file in files.values()
    ]
    return Plan(
        config=config,
        machine=machine,
        weights=sizes.weights,
        work=sizes.work(config),
        chosen=chosen,
        others=tuple(others),
        remedy=remedy,
        steps=_steps(config, sizes.one_client),
        clients=sizes.clients,
        side=sizes.side.note(sizes.weights.shapes),
        traffic=traffic(
            sizes.weights.shapes,
            rank=config.lora.rank,
            num_clients=sizes.clients,
            rounds=config.federation.rounds,
            method=config.method,
            initial=sizes.weights.base + sizes.weights.head * sizes.kind.everything,
            head=sizes.weights.head * (not sizes.kind.everything),
        ),
    )


def needs(config: Config, machine: Machine) -> Estimate:
    """Return what a run needs as it stands; `make_plan` looks for other ways, too."""
    machine = _with_nvme(config, machine)
    return Sizes(config, machine).estimate(config)


def warning(config: Config) -> str | None:
    """Return a line where this machine cannot hold the config, activations left aside.

    None, too, where there are several machines, or the model is found wanting: loading says so.
    """
    machine = this_machine()
    if machine.gpus != distributed.world_size():
        return None
    try:
        found = Sizes(config, machine).estimate(config, with_work=False)
    except UserError:
        return None
    places = [place for place in found.lacks if place in ("gpu", "host")]
    if not places:
        return None
    asked = ", ".join(f"{found.total(p) / _GB:.1f} GB in {TITLES[p]}" for p in places)
    return (
        f"warning: this run needs at least {asked}, more than there is here; fedex-scale plan "
        "names what would fit"
    )


class Sizes:
    """A config's shapes, counted once, and a micro-batch's work, counted once a setting."""

    ROOM = 0.9
    """Share of the memory that may be planned to be filled, where there is a choice."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.machine = machine
        self.dtype = models.resolve_dtype(config.model)
        if config.model.dtype == "auto" and not machine.is_cpu:
            self.dtype = torch.bfloat16
        method = METHODS[config.method.name]
        self.one_client = method.one_client
        number = 1 if method.one_client else config.partition.num_clients
        self.clients = len(choose_clients(config.federation, number, 0, 1))
        self.side = Side.of(config, self.clients)
        kind = kind_without_rows(config)
        self.kind = dataclasses.replace(kind, everything=config.method.name == "full")
        self._model = footprint.shape_model(
            config.model,
            config.lora,
            dtype=self.dtype,
            trains=method.trains,
            side_rank=self.side.trained,
            has_planes=config.aggregate.fold == "planes" and self.side.each > 0,
            fused=config.engine.fused_lora,
            kind=self.kind,
        )
        self.weights = footprint.count_weights(self._model)
        self._works: dict[tuple, Work] = {}

    def work(self, config: Config) -> Work:
        examples = config.train.at_once(config.data.max_length)
        key = (examples, config.model.gradient_checkpointing)
        if key not in self._works:
            try:
                self._works[key] = footprint.run_shapes(
                    self._model,
                    examples=examples,
                    length=config.data.max_length,
                    checkpointing=config.model.gradient_checkpointing,
                    device="cpu" if self.machine.is_cpu else "cuda",
                    kind=self.kind,
                )
            except RuntimeError as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                raise UserError(
                    f"model: expected one that can run on shapes alone, got {config.model.path}: "
                    f"{reason}; plan cannot count its activations"
                ) from None
        return self._works[key]

    def filled(self, config: Config) -> Config:
        """Return the config with as many tokens at once as there is room for, if it says auto."""
        if config.train.micro_batch_tokens != "auto":
            return config
        share = math.ceil(config.train.batch_size / self.machine.gpus)
        sizes = [share]
        while sizes[-1] > 1:
            sizes.append(math.ceil(sizes[-1] / 2))
        for size in sizes:
            tokens = size * config.data.max_length
            trial = replace(config, train=replace(config.train, micro_batch_tokens=tokens))
            if size == 1 or self.estimate(trial, room=self.ROOM).fits:
                break
        return trial

    def estimate(self, config: Config, *, with_work: bool = True, room: float = 1) -> Estimate:
        machine = self.machine
        if room < 1:
            host = machine.host_memory and int(room * machine.host_memory)
            machine = dataclasses.replace(
                machine, gpu_memory=int(room * machine.gpu_memory), host_memory=host
            )
        return estimate(
            config,
            read_settings(config.engine.deepspeed),
            machine,
            self.weights,
            self.work(config) if with_work else None,
            self.dtype,
            clients=self.clients,
        )


def _with_nvme(config: Config, machine: Machine) -> Machine:
    """Add the room on this machine's NVMe where the config uses one, and none is described."""
    settings = read_settings(config.engine.deepspeed) or {}
    offload = settings.get("zero_optimization", {}).get("offload_param") or {}
    if offload.get("device") != "nvme" or machine.nvme is not None:
        return machine
    path = config.engine.nvme_path
    if path is None or not Path(path).is_dir():
        raise UserError(
            f"engine.nvme_path: expected a directory on a local NVMe, got {path or 'none'}; make "
            "it, or describe another machine with --nvme 1TB"
        )
    try:
        os.close(os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise UserError(
            "engine.nvme_path: expected a file system for direct access (AIO) and leave to write, "
            f"got {path} ({error.strerror}); choose a directory on a local disk"
        ) from None
    return dataclasses.replace(machine, nvme=shutil.disk_usage(path).free)


def _cheapest(config: Config, machine: Machine, sizes: Sizes) -> str | None:
    """Return the overrides that make a config fit at the least cost in time, or None.

    A base of 8 or 4 bits is another model: only where nothing else helps.
    """
    fitting = []
    for number, other in enumerate(_changes(config, machine)):
        found = sizes.estimate(other)
        if found.fits:
            packed = other.model.quantization != config.model.quantization
            fitting.append((packed, found.step_s or 0, number, other))
    return _overrides(config, min(fitting)[3]) if fitting else None


def _changes(config: Config, machine: Machine) -> Iterator[Config]:
    """Yield configs that may fit where the given one does not, small changes first."""
    own = config.engine.deepspeed
    names = ["zero2", "zero3", "zero3_offload", *["zero3_nvme"] * (machine.nvme is not None)]
    files = dict.fromkeys([own, None, *names])
    packings = ["none"] if config.model.random else ["none", "int8", "nf4"]
    train, longest = config.train, config.data.max_length
    trains = [train, replace(train, micro_batch_size=1)]
    if train.micro_batch_tokens is not None:
        trains[1] = replace(train, micro_batch_tokens=longest)
    for packing in packings:
        for smaller in dict.fromkeys(trains):
            for checkpointing in sorted({config.model.gradient_checkpointing, True}):
                for file in files:
                    yield replace(
                        config,
                        engine=replace(config.engine, deepspeed=file),
                        train=smaller,
                        model=replace(
                            config.model,
                            gradient_checkpointing=checkpointing,
                            quantization=packing,
                        ),
                    )


def _overrides(config: Config, other: Config) -> str:
    """Return what another config changes, as it is written on the command line."""
    sizes = ("train.micro_batch_size", "train.micro_batch_tokens")
    keys = ("engine.deepspeed", "model.gradient_checkpointing", "model.quantization", *sizes)
    return " ".join(word for key in keys for word in _override(config, other, key))


def _override(config: Config, other: Config, name: str) -> list[str]:
    section, _, key = name.partition(".")
    old, new = (getattr(getattr(c, section), key) for c in (config, other))
    if old == new:
        return []
    return [f"{name}={'null' if new is None else str(new).lower()}"]


def _steps(config: Config, one_client: bool) -> int | None:
    rows = config.data.num_examples
    if rows is None:
        return config.train.max_steps
    share = 1 if one_client else config.partition.num_clients
    return num_steps(math.ceil(rows / share), config.train)
