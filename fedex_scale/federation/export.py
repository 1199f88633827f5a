"""A finished run as one adapter for the untouched base, or as a merged model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedex_scale.aggregation.weights import Target, as_stats, fold
from fedex_scale.config.learning import ModelSection
from fedex_scale.federation.final import residuals_of, rounds_without_factors, weight_of
from fedex_scale.files.adapter_writers import AdapterWriter
from fedex_scale.files.adapters import Adapter, out_of_range
from fedex_scale.files.basefiles import BaseFiles, BaseWriter, base_directory
from fedex_scale.files.run_dir import RunDir
from fedex_scale.methods.algebra import LowRank, all_finite, compress, norm, stack
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import building, check_out


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_run` made: ranks, and the relative error against the run's exact update."""

    rounds: int
    rank: int
    error: float


def export_run(
    directory: Path,
    out: Path,
    *,
    rank: int | None = None,
    merged: bool = False,
    dtype: str | None = None,
    on_layer: Callable[[str], None] = lambda layer: None,
) -> Exported:
    """Turn a run into one adapter for the untouched base, or into a merged model.

    The adapter has the server's rank plus that of every round's residual, and is exact.

    Args:
        rank: of the adapter instead: the best approximation of that rank.
        merged: add everything to the base's weights, in one step, and write the model.
        dtype: float32 or bfloat16, of a merged model; None: the base's own.

    Raises:
        UserError: not a run, unfinished, with a round whose residual was not kept, or with numbers
            that are not finite.
    """
    if merged and rank is not None:
        raise UserError("export: --rank is for an adapter; leave it out with --merged")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"export: --dtype: expected float32 or bfloat16, got {dtype}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UserError(f"export: --rank: expected a whole number of at least 1, got {rank}")
    if dtype and not merged:
        raise UserError("export: --dtype is for a merged model; adapters are float32")
    run = RunDir(directory)
    model, last = _read_run(run)
    missing = rounds_without_factors(run, last)
    if missing:
        raise UserError(
            f"{directory}: round {missing[0]} had too many clients to keep its residual; use "
            "final/adapter, with final/base if there is one"
        )
    parts = [Adapter(run.adapter(last)), *residuals_of(run, last)]
    if not parts[0].layers:
        raise UserError(
            f"{directory}: expected a run that trained adapters, got one of method full; "
            "final/model is the model"
        )
    check_out(out, apart_from=directory)
    if merged:
        return _export_merged(model, parts, out, dtype, last, on_layer)
    return _export_adapter(model.path, parts, out, rank, last, on_layer)


def _export_adapter(
    base: str,
    parts: list[Adapter],
    out: Path,
    rank: int | None,
    rounds: int,
    on_layer: Callable[[str], None],
) -> Exported:
    server = parts[0]
    whole = sum(part.rank for part in parts)
    most = max(whole, *(max(server.shapes(layer)) for layer in server.layers))
    if rank is not None and rank > most:
        raise UserError(
            f"export: --rank: expected at most {most:,}, the widest layer's, got {rank:,}; the "
            f"adapter is exact from {whole} on"
        )
    shapes = {layer: server.shapes(layer) for layer in server.layers}
    written = rank or whole
    num_bytes = sum(4 * written * sum(shape) for shape in shapes.values())
    lost = total = 0.0
    with (
        building(out, num_bytes=num_bytes) as scratch,
        AdapterWriter(
            scratch,
            shapes,
            rank=written,
            alpha=written,
            base=base,
            fan_in_fan_out=bool(server.config.get("fan_in_fan_out")),
            settings=_task_settings(server),
            full_weights=server.full_specs(),
        ) as writer,
    ):
        for name in server.full_weights:
            writer.write_full(name, server.file.blocks(name))
        for layer in shapes:
            joined = _sum_of(parts, layer)
            if rank is not None:
                joined, missed, kept = _compressed(layer, joined, rank)
                lost += missed**2
                total += missed**2 + kept**2
            writer.write_sum(layer, [joined])
            on_layer(layer)
    return Exported(rounds=rounds, rank=written, error=(lost / total) ** 0.5 if lost else 0.0)


def _export_merged(
    model: ModelSection,
    parts: list[Adapter],
    out: Path,
    dtype: str | None,
    rounds: int,
    on_layer: Callable[[str], None],
) -> Exported:
    base = BaseFiles(base_directory(model.path, model.revision))
    check_out(out, apart_from=base.path)
    server = parts[0]
    if server.full_weights:
        raise UserError(
            "export: --merged: expected an adapter alone, got a trained head as well "
            f"({server.full_weights[0]}, ...), which a base model has no place for; leave "
            "--merged out"
        )
    flag = bool(server.config.get("fan_in_fan_out"))
    names = {layer: weight_of(base, layer) for layer in server.layers}
    intended = missed = 0.0
    with ExitStack() as exits:
        writer = BaseWriter(
            base, out, set(names.values()), dtype=getattr(torch, dtype) if dtype else None
        )
        writer.out = exits.enter_context(building(out, num_bytes=writer.num_bytes))
        exits.callback(writer.close)
        for layer, name in names.items():
            shape = server.shapes(layer)
            transposed = base.is_transposed(name, shape, flag)
            target = Target(
                lend=lambda name=name: writer.lend(name),
                shape=base.shape(name),
                numel=shape[0] * shape[1],
                transposed=transposed,
            )
            (stats,) = as_stats(fold(target, [_sum_of(parts, layer)], carry=False))
            if not math.isfinite(stats.intended + stats.missed):
                raise out_of_range(layer)
            intended, missed = intended + stats.intended, missed + stats.missed
            on_layer(layer)
        writer.finish()
    return Exported(rounds=rounds, rank=0, error=(missed / intended) ** 0.5 if intended else 0.0)


def _task_settings(server: Adapter) -> dict[str, Any]:
    """Return what an adapter_config.json says of the task."""
    return {k: v for k, v in server.config.items() if k in ("task_type", "modules_to_save")}


def _sum_of(parts: list[Adapter], layer: str) -> LowRank:
    """Return what all parts do to a layer.

    Raises:
        UserError: a number that is not finite.
    """
    pairs = [(part.pair(layer).float(), part.scaling_of(layer)) for part in parts]
    for part, (pair, _) in zip(parts, pairs, strict=True):
        if not all_finite(*pair):
            raise UserError(
                f"{part.path}, layer {layer}: expected finite numbers, got NaN or Inf; "
                "restore this file of the run, or resume the run from an earlier round"
            )
    return stack(*(LowRank(pair.B_OR * scaling, pair.A_RI) for pair, scaling in pairs))


def _compressed(layer: str, whole: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """Return the best part of a rank, the norm of what it misses, and its own."""
    try:
        best, rest = compress(whole, rank)
        missed, kept = norm(rest), norm(best)
    except torch.linalg.LinAlgError:  # of a matrix that is not finite
        raise out_of_range(layer) from None
    if not math.isfinite(missed + kept):
        raise out_of_range(layer)
    return best, missed, kept


def _read_run(run: RunDir) -> tuple[ModelSection, int]:
    """Return the model section of a run's config, and its last round."""
    model, last = run.config().model, run.rounds_done()
    if last == 0:
        raise UserError(f"{run.path}: expected a run with a finished round, found none")
    return model, last
