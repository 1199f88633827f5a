"""What `fedex-scale aggregate` is to do: opened, checked and measured, with nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fedex_scale.aggregation.aggregator import Round, check_clients
from fedex_scale.aggregation.ranks import MAX_SIDE_RANK, base_update_rank, is_streamed
from fedex_scale.aggregation.screening import screen
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.files.adapters import PREFIX, Adapter
from fedex_scale.files.basefiles import BaseFiles, BaseWriter, base_directory
from fedex_scale.files.tensorfile import SafetensorsReader
from fedex_scale.methods.algebra import normalise_weights
from fedex_scale.methods.all import METHODS
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import check_out

MAX_RANK_OF_MANY = 128
"""Columns of the side adapter where the clients are too many to be in memory at once."""


def prepare(job: Job) -> Plan:
    """Open and check everything before anything is written."""
    base = BaseFiles(base_directory(job.base))
    for given in (base.path, *job.clients):
        check_out(job.out, apart_from=given)
    most = 4 * len(base.names) + 1000  # factors, whole weights and copies of what BASE has
    adapters = [Adapter(path, most_tensors=most) for path in job.clients]
    for adapter in adapters:
        if not adapter.layers:
            raise UserError(
                f"{adapter.path}: expected LoRA weights, found none; is it of method full?"
            )
        _check_whole(adapter, base)
    adapters, weights, notes = _screened(job, adapters, _weights(job))
    rank = max(adapter.rank for adapter in adapters)
    update_rank = base_update_rank(job.method, len(adapters), rank)
    side_rank = 0
    if job.section.fold == "side" and update_rank:
        most = MAX_RANK_OF_MANY if is_streamed(len(adapters), rank) else MAX_SIDE_RANK
        side_rank = job.section.side_rank
        side_rank = min(update_rank, most) if side_rank == "auto" else side_rank
    if job.method.assign == "keep" and (
        side_rank < update_rank or is_streamed(len(adapters), rank)
    ):
        raise UserError(
            "assign: keep gives each client a base of its own, which works only with few clients "
            "and fold: side, whole; leave out --fold and --side-rank, or choose --assign average"
        )
    plan = Plan(
        base=base,
        adapters=adapters,
        task_type=_task_type(adapters),
        weights=weights,
        notes=notes,
        rank=rank,
        update_rank=update_rank,
        side_rank=side_rank,
        names={},
        shapes={layer: adapters[0].shapes(layer) for layer in adapters[0].layers},
        transposed={},
    )
    check_clients(round_of(plan))
    _check_full_weights(adapters)
    _check_base_copies(plan)
    _find_weights(plan, folds=update_rank > side_rank)
    return plan


def _check_whole(adapter: Adapter, base: BaseFiles) -> None:
    """Raise a UserError for a whole weight that the base has in another width.

    Its height may be another one, of a vocabulary or of classes that were added.
    """
    for name, (_, shape) in adapter.full_specs().items():
        layer, _, kind = name.removeprefix(PREFIX).rpartition(".")
        found = base.find(layer, kind)
        if found is not None and base.shape(found)[1:] != shape[1:]:
            raise UserError(
                f"{adapter.path}: {name}: expected a weight as the base's, "
                f"{tuple(base.shape(found))}, got {shape}; was it trained on another base model?"
            )


def _weights(job: Job) -> list[float]:
    if job.method.name == "full":
        raise UserError("method: full is for runs, which train every weight; use fedit or fedex")
    if METHODS[job.method.name].one_client:
        raise UserError(f"method: {job.method.name} has one client, nothing to aggregate")
    if not job.clients:
        raise UserError("clients: expected at least one adapter directory, got none")
    weights = job.weights if job.weights is not None else [1.0] * len(job.clients)
    if len(weights) != len(job.clients):
        raise UserError(
            f"weights: expected {len(job.clients)}, one a client, got {len(weights)}; "
            "give them in the order of the clients"
        )
    return normalise_weights(weights)


def _screened(
    job: Job, adapters: list[Adapter], weights: list[float]
) -> tuple[Sequence[Adapter], Sequence[float], list[str]]:
    """Return the clients that `robust` leaves, their weights, and what to tell of it."""
    if job.section.robust == "none":
        return adapters, weights, []
    if job.method.assign == "keep":
        raise UserError("robust: assign keep leaves every client its own; use --assign average")
    if len(adapters) < 3:
        raise UserError(
            f"robust: {job.section.robust} tells one client from most, of three or more, got "
            f"{len(adapters)}; use none"
        )
    for adapter in adapters:
        if adapter.full_weights:
            raise UserError(
                f"{adapter.path}, {adapter.full_weights[0]}: what a whole weight was before is not "
                "known here, and robust could not tell a change of it; leave out --robust"
            )
    rank = max(adapter.rank for adapter in adapters)
    done = screen(
        Round(
            clients=adapters,
            weights=weights,
            previous=None,
            rank=rank,
            scaling=adapters[0].scaling,
        ),
        job.section,
    )
    return done.round.clients, done.round.weights, done.notes


def _find_weights(plan: Plan, *, folds: bool) -> None:
    """Fill in where each layer's weight lies, and check that it can take a fold if it has to."""
    base, quantized = plan.base, "quantization_config" in plan.base.config
    if folds and quantized:
        raise UserError(
            f"{base.path}: a quantized base cannot take a residual; use --fold side, without "
            "--side-rank"
        )
    flag = bool(plan.adapters[0].config.get("fan_in_fan_out"))
    for layer, shape in plan.shapes.items():
        name, tied = base.find(layer), base.is_tied(layer)
        if tied and folds:
            raise UserError(
                f"layer {layer}: its weight is the embedding's too, which a fold would change; "
                "use --fold side, without --side-rank"
            )
        if name is None and not tied:
            plan.transposed[layer] = _is_made_transposed(plan, layer, flag, folds)
            continue
        if name is None or quantized:
            plan.transposed[layer] = flag
            continue
        if name in plan.names.values():
            other = next(x for x, taken in plan.names.items() if taken == name)
            raise UserError(
                f"layers {other} and {layer}: share the weight {name}, which would take both "
                "updates; adapt one of them"
            )
        plan.transposed[layer] = base.is_transposed(name, shape, flag)
        plan.names[layer] = name
    if not folds:
        plan.names.clear()


def _is_made_transposed(plan: Plan, layer: str, flag: bool, folds: bool) -> bool:
    """Return whether a weight that transformers makes of others is (I, O) in the model."""
    base, made = plan.base, plan.base.loaded_as(layer)
    if made is None:
        raise UserError(
            f"layer {layer}: {base.path} has no such weight, or several that it could be; were the "
            "clients trained on another base model?"
        )
    if folds:
        raise UserError(
            f"layer {layer}: transformers makes its weight of others in {base.path}, which a fold "
            "cannot write; use --fold side, without --side-rank"
        )
    return base.is_transposed(layer, plan.shapes[layer], flag, made.shape)


def _check_full_weights(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters:
        shapes = [
            {name: x.file.entries[name].shape for name in x.full_weights} for x in (first, adapter)
        ]
        for name in sorted(set(shapes[0]) ^ set(shapes[1])):
            raise UserError(f"{name}: only some clients have it; every client must train the same")
        for name, shape in shapes[0].items():
            if shapes[1][name] != shape:
                raise UserError(
                    f"{adapter.path}, {name}: expected shape {shape}, got {shapes[1][name]}; "
                    "every client must train the same"
                )


def _check_base_copies(plan: Plan) -> None:
    """Raise a UserError where an adapter brings a weight of the base that is not BASE's.

    BASE's own is left out of the result: loading it would take back what a fold added to it.
    """
    for adapter in plan.adapters:
        for name, own in adapter.base_copies.items():
            layer, _, kind = own.rpartition(".")
            found = plan.base.find(layer, kind)
            names = [found] if found else []
            if found is None and plan.base.is_tied(layer):
                shape = adapter.file.entries[name].shape
                names = [n for n in plan.base.names if plan.base.shape(n) == shape]
            if not any(_is_copy(adapter.file, name, plan.base, n) for n in names):
                raise UserError(
                    f"{adapter.path}, {name}: expected the weight of {plan.base.path}, got "
                    "another; give the base that it was trained on, and adapt the layer by LoRA "
                    "alone"
                )


def _is_copy(file: SafetensorsReader, name: str, base: BaseFiles, original: str) -> bool:
    """Return whether a file's weight is one of the base's, in the dtype of the former."""
    dtype, shape = file.entries[name].dtype, file.entries[name].shape
    if shape != base.shape(original):
        return False
    start = 0
    for copy in file.blocks(name):
        stop = start + copy.numel()
        buffer = torch.empty(copy.numel() * base.dtype(original).itemsize, dtype=torch.uint8)
        (part,) = base.blocks(original, (start, stop), buffer)
        if not torch.equal(part.to(dtype), copy):
            return False
        start = stop
    return True


def _task_type(adapters: Sequence[Adapter]) -> str | None:
    """Return the task that the clients name; PEFT wraps the model by it, or not at all."""
    tasks = {adapter.config.get("task_type") for adapter in adapters} - {None}
    if len(tasks) > 1:
        raise UserError(
            f"task_type: expected one of all clients, got {', '.join(sorted(tasks))}; aggregate "
            "adapters of one task"
        )
    return next(iter(tasks), None)


def round_of(plan: Plan) -> Round:
    return Round(
        clients=plan.adapters,
        weights=plan.weights,
        previous=None,
        rank=plan.rank,
        scaling=plan.scaling,
        side_rank=plan.side_rank,
    )


def num_bytes(job: Job, plan: Plan) -> int:
    """Return how much will be written at most."""
    total = plan.adapter_bytes(plan.written_rank)
    if job.method.assign == "keep":
        count = len(plan.adapters)
        total += count * plan.adapter_bytes((count + 1) * plan.rank)
    if plan.names:
        dtype = getattr(torch, job.dtype) if job.dtype else None
        total += BaseWriter(plan.base, job.out, set(), dtype=dtype).num_bytes
    return total


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to aggregate, and how."""

    base: str
    """Hugging Face model directory, or hub id."""
    out: Path
    """Directory to make."""
    clients: tuple[Path, ...]
    """PEFT adapter directories."""
    weights: tuple[float, ...] | None = None
    """One a client, of any sum; none: all alike."""
    method: MethodConfig = field(default_factory=MethodConfig)
    section: AggregateSection = field(default_factory=AggregateSection)
    dtype: Literal["float32"] | None = None
    """Of a changed base; none: that of BASE."""
    seed: int = 0
    """For methods that draw a fresh adapter."""

    def __post_init__(self) -> None:
        if self.section.fold == "planes":
            raise UserError(
                "--fold: planes is for runs, whose forward pass can have them; use side, or carry"
            )
        if self.dtype not in (None, "float32"):
            raise UserError(f"dtype: expected float32 or nothing, got {self.dtype}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job's inputs, opened and checked, and the sizes of its results.

    Fields:
        task_type: of all clients, as PEFT names it, or None.
        notes: what was done to clients that stand out.
        rank: of the server's pair; the highest of all clients.
        update_rank: columns of what the method adds to the base; 0 if it adds nothing.
        side_rank: columns of the adapter that hold that; 0 if it goes into the base.
        names: each layer's weight in the base's files, of layers whose weight may change.
        shapes: each layer's (O, I).
        transposed: whether each layer's weight is stored as (I, O).
    """

    base: BaseFiles
    adapters: Sequence[Adapter]
    task_type: str | None
    weights: Sequence[float]
    notes: Sequence[str]
    rank: int
    update_rank: int
    side_rank: int
    names: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    transposed: dict[str, bool]

    @property
    def scaling(self) -> float:
        return self.adapters[0].scaling

    @property
    def written_rank(self) -> int:
        return self.rank + self.side_rank

    def adapter_bytes(self, rank: int) -> int:
        """Return the size of an adapter of such a rank, with the whole weights that come along."""
        factors = sum(4 * rank * (num_out + num_in) for num_out, num_in in self.shapes.values())
        entries = self.adapters[0].file.entries
        return factors + sum(
            entries[n].end - entries[n].start for n in self.adapters[0].full_weights
        )
