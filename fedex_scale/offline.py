"""Aggregate PEFT adapters that lie on disk, for a base model that lies on disk: no model, no GPU.

`fedex-scale aggregate`. The same aggregator as in a run's rounds; one layer's factors and one
weight are in memory at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from fedex_scale.adapters import CONFIG_FILE, Adapter, AdapterWriter
from fedex_scale.aggregator import (
    AggregateReport,
    AggregateSection,
    Round,
    Sinks,
    aggregate,
    base_update_rank,
    check_clients,
    is_streamed,
)
from fedex_scale.algebra import MAX_RANK, LowRank, Pair, normalise_weights
from fedex_scale.basefiles import BaseFiles, BaseWriter, base_directory
from fedex_scale.errors import UserError
from fedex_scale.methods import METHODS, MethodConfig
from fedex_scale.outputs import building, check_out
from fedex_scale.state import derive_seed
from fedex_scale.weights import Target

# Of a client's adapter_config.json, what the result's takes over.
_TAKEN_OVER = (
    "task_type target_modules exclude_modules layers_to_transform layers_pattern modules_to_save"
).split()


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
        if self.dtype not in (None, "float32"):
            raise UserError(f"dtype: expected float32 or nothing, got {self.dtype}")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A job's inputs, opened and checked, and the sizes of its results.

    Fields:
        rank: of the server's pair; the highest of all clients.
        update_rank: columns of what the method adds to the base; 0 if it adds nothing.
        side_rank: columns of the adapter that hold that; 0 if it goes into the base.
        names: each layer's weight in the base's files, of layers whose weight may change.
        shapes: each layer's (O, I).
        conv1d: whether weights are stored as (I, O).
    """

    base: BaseFiles
    adapters: Sequence[Adapter]
    weights: Sequence[float]
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


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Return numbers from a list with commas."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"weights: expected numbers with commas between, such as 0.5,0.3,0.2, got {text}"
        ) from None


def describe(job: Job, report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that tell a person what was made."""
    share = report["residual_norm"] / (report["ideal_norm"] or 1.0)
    yield (
        f"{job.method.name}: {len(report['clients'])} clients, {len(report['layers'])} layers in "
        f"{report['seconds']:.1f} s; residual {share:.2%} of the update, "
        f"kept {report['kept']:.4%} of it"
    )
    for note in report["notes"]:
        yield f"note: {note}"
    for_base = job.out / "base" if report["base_changed"] else f"{job.base}, untouched"
    yield f"adapter: {job.out / 'adapter'} (rank {report['adapter_rank']}), for {for_base}"


def aggregate_files(job: Job, console: Console | None = None) -> dict[str, Any]:
    """Aggregate the clients' adapters; return the report that is written to OUT/report.json.

    Writes OUT/adapter, with `fold: side` for the untouched base and otherwise for OUT/base, which
    is there only if a weight changed. With `assign: keep`, OUT/clients has one adapter a client,
    for the untouched base.

    Raises:
        UserError: an input that cannot be used, or no room. BASE is never touched, and OUT is
            there whole or not at all.
    """
    began = time.perf_counter()
    plan = _prepare(job)
    dtype = getattr(torch, job.dtype) if job.dtype else None
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        task = progress.add_task("aggregating", total=_num_bytes(job, plan))
        scratch = stack.enter_context(building(job.out, num_bytes=_num_bytes(job, plan)))
        writer = BaseWriter(
            plan.base,
            scratch / "base",
            set(plan.names.values()),
            dtype=dtype,
            on_bytes=lambda count: progress.advance(task, count),
        )
        stack.callback(writer.close)
        report = _aggregate(job, plan, scratch, writer, lambda count: progress.advance(task, count))
        if report.base_changed:
            writer.finish()
        else:
            writer.discard()
        _name_base(scratch / "adapter", job, report.base_changed)
        result = _report(job, plan, report, time.perf_counter() - began)
        (scratch / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _prepare(job: Job) -> _Plan:
    """Open and check everything before anything is written."""
    base = BaseFiles(base_directory(job.base))
    check_out(job.out, apart_from=base.path)
    adapters = [Adapter(path) for path in job.clients]
    weights = _weights(job)
    rank = max(adapter.rank for adapter in adapters)
    update_rank = base_update_rank(job.method, len(adapters), rank)
    side_rank = 0
    if job.section.fold == "side" and update_rank:
        side_rank = job.section.side_rank or min(update_rank, MAX_RANK)
    if job.method.assign == "keep" and (
        side_rank < update_rank or is_streamed(len(adapters), rank)
    ):
        raise UserError(
            "assign: keep gives each client a base of its own, which works only with few clients "
            "and fold: side, whole; leave out --fold and --side-rank, or choose --assign average"
        )
    plan = _Plan(
        base=base,
        adapters=adapters,
        weights=weights,
        rank=rank,
        update_rank=update_rank,
        side_rank=side_rank,
        names={},
        shapes={layer: adapters[0].shapes(layer) for layer in adapters[0].layers},
        transposed={},
    )
    check_clients(_round(plan))
    _check_full_weights(adapters)
    _find_weights(plan, folds=update_rank > side_rank)
    return plan


def _weights(job: Job) -> list[float]:
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


def _find_weights(plan: _Plan, *, folds: bool) -> None:
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
            raise UserError(
                f"layer {layer}: {base.path} has no such weight; were the clients trained on "
                "another base model?"
            )
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


def _round(plan: _Plan) -> Round:
    return Round(
        clients=plan.adapters,
        weights=plan.weights,
        previous=None,
        rank=plan.rank,
        scaling=plan.scaling,
        side_rank=plan.side_rank,
    )


def _num_bytes(job: Job, plan: _Plan) -> int:
    """Return how much will be written at most."""
    total = plan.adapter_bytes(plan.written_rank)
    if job.method.assign == "keep":
        count = len(plan.adapters)
        total += count * plan.adapter_bytes((count + 1) * plan.rank)
    if plan.names:
        dtype = getattr(torch, job.dtype) if job.dtype else None
        total += BaseWriter(plan.base, job.out, set(), dtype=dtype).num_bytes
    return total


def _aggregate(
    job: Job, plan: _Plan, scratch: Path, writer: BaseWriter, on_bytes: Any
) -> AggregateReport:
    """Write the adapters and the changed weights."""
    with ExitStack() as stack:
        out = stack.enter_context(_open_adapter(scratch / "adapter", plan, plan.written_rank))
        sinks = _sinks(job, plan, out, scratch, stack)
        report = aggregate(
            _round(plan),
            job.method,
            job.section,
            {layer: _target(plan, writer, layer) for layer in plan.shapes},
            sinks,
            seed=lambda layer: derive_seed(job.seed, "fresh", layer),
            on_layer=lambda layer: on_bytes(4 * plan.written_rank * sum(plan.shapes[layer])),
        )
        for name in plan.adapters[0].full_weights:
            out.write_full(name, _mean_blocks(plan, name))
            entry = plan.adapters[0].file.entries[name]
            on_bytes(entry.end - entry.start)
    return report


def _sinks(job: Job, plan: _Plan, out: AdapterWriter, scratch: Path, stack: ExitStack) -> Sinks:
    """Return sinks that write the pair and what the side holds as one adapter."""
    pairs: dict[str, Pair] = {}

    def write_joined(layer: str, kept: LowRank) -> None:
        pair = pairs.pop(layer)
        out.write_sum(layer, [LowRank(pair.B_OR * plan.scaling, pair.A_RI), kept])

    client = None
    if job.method.assign == "keep":
        rank = (len(plan.adapters) + 1) * plan.rank
        writers = [
            stack.enter_context(_open_adapter(scratch / "clients" / f"client-{k:04d}", plan, rank))
            for k in range(len(plan.adapters))
        ]
        for k, writer in enumerate(writers):
            for name in plan.adapters[k].full_weights:
                writer.write_full(name, plan.adapters[k].file.blocks(name))

        def client(layer: str, k: int, pieces: Iterable[LowRank]) -> None:
            writers[k].write_sum(layer, pieces)

    if plan.side_rank:
        return Sinks(adapter=pairs.__setitem__, side=write_joined, client=client)
    return Sinks(adapter=out.write, client=client)


def _open_adapter(path: Path, plan: _Plan, rank: int) -> AdapterWriter:
    """Return a writer; an adapter of a higher rank than the server's holds scaling in its B."""
    config = plan.adapters[0].config
    settings = {key: config[key] for key in _TAKEN_OVER if config.get(key) is not None}
    entries = plan.adapters[0].file.entries
    return AdapterWriter(
        path,
        plan.shapes,
        rank=rank,
        alpha=plan.scaling * rank if rank == plan.rank else rank,
        base="",
        fan_in_fan_out=any(plan.transposed.values()),
        settings=settings,
        full_weights={
            name: (entries[name].dtype, entries[name].shape)
            for name in plan.adapters[0].full_weights
        },
    )


def _target(plan: _Plan, writer: BaseWriter, layer: str) -> Target:
    transposed, shape = plan.transposed[layer], plan.shapes[layer]
    stored = shape[::-1] if transposed else shape
    if layer not in plan.names:
        return Target(shape=stored, transposed=transposed)
    name = plan.names[layer]
    return Target(
        lend=lambda: writer.lend(name),
        shape=stored,
        numel=shape[0] * shape[1],
        transposed=transposed,
        carries=False,
    )


def _mean_blocks(plan: _Plan, name: str) -> Iterator[Tensor]:
    """Yield the clients' weighted mean of a whole weight, part by part."""
    streams = [adapter.file.blocks(name) for adapter in plan.adapters]
    for parts in zip(*streams, strict=True):
        mean = torch.zeros(parts[0].shape, dtype=torch.float64)
        for adapter, part, weight in zip(plan.adapters, parts, plan.weights, strict=True):
            if not torch.isfinite(part).all():
                raise UserError(
                    f"{adapter.path}, {name}: expected finite numbers, got NaN or Inf; "
                    "leave this client out"
                )
            mean.add_(part, alpha=weight)
        yield mean


def _name_base(adapter: Path, job: Job, changed: bool) -> None:
    """Let the adapters' configs name the base that they are for."""
    untouched = str(Path(job.base).resolve()) if Path(job.base).is_dir() else job.base
    for path in (adapter, *adapter.parent.glob("clients/*")):
        own_base = changed and path == adapter
        config = json.loads((path / CONFIG_FILE).read_text())
        config["base_model_name_or_path"] = (
            str(job.out.resolve() / "base") if own_base else untouched
        )
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _report(job: Job, plan: _Plan, report: AggregateReport, seconds: float) -> dict[str, Any]:
    whole = report.as_dict()
    bases = sorted({str(x.config.get("base_model_name_or_path")) for x in plan.adapters})
    notes = sorted({layer.note for layer in report.layers if layer.note})
    if len(bases) > 1:
        notes.append(f"clients name different base models: {', '.join(bases)}")
    if job.section.fold == "carry" and report.base_changed:
        notes.append("fold: carry has nothing to carry in a single aggregation; same as round")
    warning = report.warning(job.section)
    return {
        "base": job.base,
        "clients": [
            {
                "path": str(adapter.path),
                "weight": weight,
                "rank": adapter.rank,
                "scaling": adapter.scaling,
            }
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
        ],
        "method": vars(job.method),
        "fold": job.section.fold,
        "adapter_rank": plan.written_rank,
        "seconds": round(seconds, 3),
        "notes": [*([warning] if warning else []), *notes],
        **whole,
    }


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console or Console(stderr=True),
        disable=console is None or not console.is_terminal,
    )
