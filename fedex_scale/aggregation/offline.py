"""Aggregate PEFT adapters that lie on disk, for a base model that lies on disk: no model, no GPU.

`fedex-scale aggregate`. The same aggregator as in a run's rounds; one layer's factors and one
weight are in memory at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from fedex_scale.aggregation.aggregator import AggregateReport, Sinks, aggregate
from fedex_scale.aggregation.job import Job, Plan, num_bytes, prepare, round_of
from fedex_scale.aggregation.weights import Target
from fedex_scale.files.adapter_writers import AdapterWriter, target_suffixes
from fedex_scale.files.adapters import CONFIG_FILE, WEIGHTS_FILE
from fedex_scale.files.basefiles import BaseWriter
from fedex_scale.files.tensorfile import SafetensorsReader
from fedex_scale.methods.algebra import LowRank, Pair
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import building
from fedex_scale.runtime.seeds import derive_seed

# Of a client's adapter_config.json, what the result's takes over.
_TAKEN_OVER = ("modules_to_save ensure_weight_tying").split()


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Return numbers from a list with commas."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"weights: expected numbers with commas between, such as 0.5,0.3,0.2, got {text}"
        ) from None


def describe(report: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield the lines that tell a person what was made."""
    name, number = report["method"]["name"], len(report["clients"])
    share = report["residual_norm"] / (report["ideal_norm"] or 1.0)
    yield (
        f"{name}: {number} clients, {len(report['layers'])} layers in "
        f"{report['seconds']:.1f} s; residual {share:.2%} of the update, "
        f"kept {report['kept']:.4%} of it"
    )
    for note in report["notes"]:
        yield f"note: {note}"
    for_base = out / "base" if report["base_changed"] else f"{report['base']}, untouched"
    yield f"adapter: {out / 'adapter'} (rank {report['adapter_rank']}), for {for_base}"


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
    plan = prepare(job)
    size = num_bytes(job, plan)
    dtype = getattr(torch, job.dtype) if job.dtype else None
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        task = progress.add_task("aggregating", total=size)
        scratch = stack.enter_context(building(job.out, num_bytes=size))
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


def _aggregate(
    job: Job, plan: Plan, scratch: Path, writer: BaseWriter, on_bytes: Any
) -> AggregateReport:
    """Write the adapters and the changed weights."""
    with ExitStack() as stack:
        out = stack.enter_context(_open_adapter(scratch / "adapter", plan, plan.written_rank))
        clients = _open_clients(plan, scratch, stack) if job.method.assign == "keep" else []
        sinks = replace(
            _sinks(plan, out, clients),
            whole=partial(_write_whole, scratch, out, clients, on_bytes),
        )
        return aggregate(
            round_of(plan),
            job.method,
            job.section,
            {layer: _target(plan, writer, layer) for layer in plan.shapes},
            sinks,
            seed=lambda layer: derive_seed(job.seed, "fresh", layer),
            on_layer=lambda layer: on_bytes(4 * plan.written_rank * sum(plan.shapes[layer])),
        )


def _write_whole(
    scratch: Path,
    out: AdapterWriter,
    clients: Sequence[AdapterWriter],
    on_bytes: Any,
    name: str,
    blocks: Iterable[Tensor],
) -> None:
    """Write the clients' mean of a whole weight to the adapter, and from it to each client's."""
    out.write_full(name, blocks)
    mean = SafetensorsReader(scratch / "adapter" / WEIGHTS_FILE)
    for writer in clients:
        writer.write_full(name, mean.blocks(name))
    entry = mean.entries[name]
    on_bytes((1 + len(clients)) * (entry.end - entry.start))


def _open_clients(plan: Plan, scratch: Path, stack: ExitStack) -> list[AdapterWriter]:
    """Return a writer a client, of what it keeps and what it lacks."""
    rank = (len(plan.adapters) + 1) * plan.rank
    return [
        stack.enter_context(_open_adapter(scratch / "clients" / f"client-{k:04d}", plan, rank))
        for k in range(len(plan.adapters))
    ]


def _sinks(plan: Plan, out: AdapterWriter, clients: Sequence[AdapterWriter]) -> Sinks:
    """Return sinks that write the pair and what the side holds as one adapter."""
    pairs: dict[str, Pair] = {}

    def write_joined(layer: str, kept: LowRank) -> None:
        pair = pairs.pop(layer)
        out.write_sum(layer, [LowRank(pair.B_OR * plan.scaling, pair.A_RI), kept])

    def write_client(layer: str, k: int, pieces: Iterable[LowRank]) -> None:
        clients[k].write_sum(layer, pieces)

    client = write_client if clients else None
    if plan.side_rank:
        return Sinks(adapter=pairs.__setitem__, side=write_joined, client=client)
    return Sinks(adapter=out.write, client=client)


def _open_adapter(path: Path, plan: Plan, rank: int) -> AdapterWriter:
    """Return a writer; an adapter of a higher rank than the server's holds scaling in its B."""
    config = plan.adapters[0].config
    settings = {key: config[key] for key in _TAKEN_OVER if config.get(key) is not None}
    settings["task_type"] = plan.task_type
    settings["target_modules"] = _target_modules(plan)
    return AdapterWriter(
        path,
        plan.shapes,
        rank=rank,
        alpha=plan.scaling * rank if rank == plan.rank else rank,
        base="",
        fan_in_fan_out=any(plan.transposed.values()),
        settings=settings,
        full_weights=plan.adapters[0].full_specs(),
    )


def _target_modules(plan: Plan) -> list[str]:
    """Return what lets PEFT load every layer and no other: last names, or whole ones."""
    short = target_suffixes(plan.shapes)
    ends = tuple(f".{name}.weight" for name in short)
    alike = sum(name.endswith(ends) for name in plan.base.names)
    return short if alike == len(plan.shapes) else sorted(plan.shapes)


def _target(plan: Plan, writer: BaseWriter, layer: str) -> Target:
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


def _name_base(adapter: Path, job: Job, changed: bool) -> None:
    """Let the adapters' configs name the base that they are for."""
    untouched = str(Path(job.base).resolve()) if Path(job.base).is_dir() else job.base
    for path in (adapter, *adapter.parent.glob("clients/*")):
        own_base = changed and path == adapter
        config = door.read_json(path / CONFIG_FILE, "begin again", inside=path)
        config["base_model_name_or_path"] = (
            str(job.out.resolve() / "base") if own_base else untouched
        )
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _report(job: Job, plan: Plan, report: AggregateReport, seconds: float) -> dict[str, Any]:
    whole = report.as_dict()
    bases = sorted({str(x.config.get("base_model_name_or_path")) for x in plan.adapters})
    notes = sorted({layer.note for layer in report.layers if layer.note}) + report.outliers
    notes += [*plan.notes, *_odd_clients(plan)]
    if len(bases) > 1:
        notes.append(f"clients name different base models: {', '.join(bases)}")
    elif bases[0] not in ("None", "") and Path(bases[0]).name != Path(job.base).name:
        notes.append(f"all clients name another base model: {bases[0]}")
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


def _odd_clients(plan: Plan) -> Iterator[str]:
    """Yield what to know of a client besides its numbers."""
    places = [adapter.path.resolve() for adapter in plan.adapters]
    for place in sorted(set(places)):
        if places.count(place) > 1:
            yield f"client {place} is listed {places.count(place)} times, and counts as often"
    for adapter in plan.adapters:
        missed = adapter.not_targeted()
        if missed:
            yield (
                f"{adapter.path}: its target_modules name {len(adapter.layers) - len(missed)} of "
                f"the {len(adapter.layers)} layers in its file; all of them were aggregated"
            )


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console or Console(stderr=True),
        disable=console is None or not console.is_terminal,
    )
