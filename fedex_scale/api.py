"""What the package does, as functions: the command line calls these, and so may a program.

Whatever a caller can put right is a UserError, one line; so is all that these functions raise on
purpose. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedex_scale.runtime.arguments import listed, path_of
from fedex_scale.runtime.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fedex_scale.config.load import Source
    from fedex_scale.config.settings import Config
    from fedex_scale.federation.export import Exported
    from fedex_scale.methods.interface import LayerUpdate
    from fedex_scale.planning.choice import Plan

__all__ = ["UserError", "aggregate", "aggregate_layer", "evaluate", "export", "plan", "run"]

Overrides = Sequence[str] | Mapping[str, Any]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Fields:
        path: its directory; what lies there is told in README.md.
        scores: `task/metric` -> mean, from 0 to 1, by round; round 0 is before training.
    """

    path: Path
    scores: dict[int, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model's scores.

    Fields:
        scores: `task/metric` -> mean, from 0 to 1; on the first rank, and empty elsewhere.
        out: where results.json and samples.jsonl lie.
        results: all that lm-eval told.
        known_as: the base's name and the method, by which the paper's scores are found.
    """

    scores: dict[str, float]
    out: Path
    results: dict[str, Any]
    known_as: tuple[str, str] | None


def run(config: Source, overrides: Overrides | None = None) -> Run:
    """Train the clients round by round, aggregate, score and export, as `fedex-scale run` does.

    Under a launcher every rank calls this.

    Args:
        config: a YAML's path, a recipe's name such as quickstart, a tree of sections, or a Config.
        overrides: such as {"train.learning_rate": 1e-4}, or a list of section.key=value.

    Raises:
        UserError: settings, data or a model that cannot be used, before anything is trained; a
            full disk, or a client that failed.
    """
    from fedex_scale.config.load import load_config
    from fedex_scale.config.places import check_places
    from fedex_scale.runtime import launched
    from fedex_scale.runtime.waiting import waiting

    resolved = load_config(config, overrides)
    check_places(resolved)
    if launched.is_first():
        print(_begins(resolved), flush=True)
    with waiting("loading libraries"):  # importing torch and transformers takes seconds
        from fedex_scale.files.run_dir import RunDir
        from fedex_scale.reporting import record
        from fedex_scale.run import run_config
        from fedex_scale.runtime import distributed

    path = run_config(resolved)
    scores: dict[int, dict[str, float]] = {}
    for row in distributed.on_main(lambda: record.gather(RunDir(path)))["scores"]:
        scores.setdefault(row["round"], {})[f"{row['task']}/{row['metric']}"] = row["value"]
    return Run(path=path, scores=scores)


def preview(
    config: Source,
    overrides: Overrides | None = None,
    *,
    number: int = 3,
    color: bool = False,
) -> Iterator[Any]:
    """Yield what `fedex-scale data` prints of a run's data; needs no weights.

    Args:
        config, overrides: as for `run`.
        number: of examples to show.
        color: tell what is trained by its colour, not by marks around it.

    Raises:
        UserError: settings or data that cannot be used.
    """
    from fedex_scale.config.load import load_config

    settings = load_config(config, overrides)  # before imports that take seconds

    from fedex_scale.data.clients import read_clients
    from fedex_scale.data.preview import show
    from fedex_scale.engine.models import load_tokenizer

    tokenizer = load_tokenizer(settings.model)
    yield from show(read_clients(settings, tokenizer), settings, tokenizer, number, color=color)


def aggregate(
    clients: Iterable[PathLike],
    *,
    base: PathLike,
    out: PathLike,
    method: str = "fedex",
    assign: str = "average",
    svd_rank: int | None = None,
    weights: Iterable[float] | None = None,
    fold: str = "side",
    side_rank: int | Literal["auto"] = "auto",
    dtype: Literal["float32"] | None = None,
    robust: str = "none",
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Aggregate PEFT LoRA adapters that lie on disk, as `fedex-scale aggregate` does.

    Needs no GPU and does not load the model: a layer's factors are in memory at a time.

    Args:
        clients: PEFT adapter directories.
        base: the model that they were trained on: a directory or a hub id. It is never changed.
        out: directory to make: adapter/, report.json, and base/ where a weight changed.
        method, assign, svd_rank: as in the settings' section `method`.
        weights: one a client, of any sum; none: all alike.
        fold: where the residual goes: side (into the adapter), carry or round (into the base).
        side_rank: side: columns for it, and the rest goes into the base; auto: all.
        dtype: float32: write a changed base so; none: as it is.
        robust: as in the settings' section `aggregate`: none, clip or trimmed.
        seed: for methods that draw a fresh adapter.
        console: to show the progress on, where it is a terminal.

    Returns:
        What report.json holds: `adapter_rank`, `base_changed`, the part of the residual that was
        `kept` (from 0 to 1), norms in all and by layer, notes.

    Raises:
        UserError: an input that cannot be used, or no room; nothing is left behind.
    """
    from fedex_scale.aggregation.job import Job
    from fedex_scale.aggregation.offline import aggregate_files
    from fedex_scale.config.federation import AggregateSection, MethodConfig

    job = Job(
        base=path_of(base, "base"),
        out=Path(path_of(out, "out")),
        clients=tuple(Path(path_of(client, "clients")) for client in listed(clients, "clients")),
        weights=None if weights is None else tuple(listed(weights, "weights")),
        method=MethodConfig(name=method, assign=assign, svd_rank=svd_rank),
        section=AggregateSection(fold=fold, side_rank=side_rank, robust=robust),
        dtype=dtype,
        seed=seed,
    )
    return aggregate_files(job, console)


def aggregate_layer(
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    scaling: float,
    weights: Iterable[float] | None = None,
    previous: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    **method: Any,
) -> LayerUpdate:
    """Aggregate one layer's LoRA pairs in memory, for a trainer of one's own.

    A layer is applied as W + scaling * B A. After W += sum of U V over the update's pieces, and
    with its new pair, the layer computes what the method says; of fedex the mean of the clients'
    layers, exactly.

    Args:
        pairs: A (R, I) and B (O, R) of each client, any float dtype, on one device.
        scaling: alpha / R, or alpha / sqrt(R) for rsLoRA.
        weights: one a client, of any sum; none: all alike.
        previous: the server's pair that the clients began with; ffa checks their A against it.
        seed: of the fresh pair that flora, and fedex with assign="reinit", go on with.
        method: values of the settings' section `method`, such as name="flexlora" or svd_rank=8.

    Returns:
        `pair`, the new A_RI and B_OR, and `base_update`, pieces U_OP (O, P) and V_PI (P, I),
        computed as they are iterated, none where the method adds nothing; all float32. With
        assign="keep", `client_update(k)` gives client k's pieces. `note`: a line, or None.

    Raises:
        UserError: no pairs, shapes that do not go together, numbers that are not finite, or a
            setting that cannot be.
    """
    from fedex_scale.methods.given import aggregate_given

    return aggregate_given(
        listed(pairs, "pairs"),
        scaling=scaling,
        weights=weights,
        previous=previous,
        seed=seed,
        method=method,
    )


def evaluate(
    model: PathLike,
    *,
    adapter: PathLike | None = None,
    suite: str | Sequence[str] = (),
    limit: int | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
    batch_size: int | Literal["auto"] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    trust_remote_code: bool = False,
    include_path: PathLike | None = None,
    out: PathLike | None = None,
    backend: Literal["hf", "vllm"] = "hf",
    python: str = sys.executable,
) -> Scored:
    """Score a run's final model, or any model, with lm-eval, as `fedex-scale evaluate` does.

    Args:
        model: a run's directory, a model's directory, or a hub id.
        adapter: PEFT directory; none: of a run its final/adapter.
        suite: tasks and groups; none: the run's own.
        limit: the first so many examples of each task; none: all.
        data_dir: where local test sets lie; none: the environment's FEDEX_SCALE_DATA.
        num_fewshot: examples in a stock task's prompt; none: as the task has it.
        batch_size: prompts at once; none: the run's own, or 16.
        dtype: to compute in; none: the run's own, or what is fast.
        trust_remote_code: run Python code that comes with the model, which a run's own config
            cannot ask for.
        include_path: directory with lm-eval tasks of one's own, which may run code; a run's own
            config cannot ask for it either.
        out: directory to make; none: a new one in the run, or below evaluations/.
        backend: vllm: by lm-eval's own vLLM backend, in the environment of `python`.
        python: for vllm: an interpreter that has vLLM, lm-eval and this package.

    Raises:
        UserError: an unfinished run, an unknown task, missing rows, or an adapter for another base.
    """
    from fedex_scale.runtime import distributed
    from fedex_scale.scoring import post_hoc
    from fedex_scale.scoring.evaluation import scores

    asked = {
        "tasks": tuple(listed(suite, "suite")),
        "limit": limit,
        "data_dir": data_dir,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "include_path": None if include_path is None else path_of(include_path, "include_path"),
    }
    asked = {name: value for name, value in asked.items() if value not in (None, ())}
    path = None if adapter is None else Path(path_of(adapter, "adapter"))
    distributed.join_group(required=False)
    subject = distributed.together(
        lambda: post_hoc.find_subject(
            path_of(model, "model"), path, asked, dtype=dtype, trust_remote_code=trust_remote_code
        )
    )
    place = Path(path_of(out, "out")) if out else subject.out
    if backend == "vllm":
        from fedex_scale.scoring import vllm

        results = vllm.score(subject, place, python)
    elif backend == "hf":
        results = post_hoc.score(subject, place)
    else:
        raise UserError(f"--backend: expected hf or vllm, got {backend!r}; name one")
    return Scored(scores=scores(results), out=place, results=results, known_as=subject.known_as)


def export(
    run: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    merged: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Exported:
    """Turn a finished run into one adapter for the untouched base, or into a merged model.

    Args:
        run: the run's directory.
        out: directory to make.
        rank: of the adapter; none: as many columns as make it exact.
        merged: write a whole model.
        dtype: of a merged model; none: the base's.

    Returns:
        `rounds` of the run, the adapter's `rank` (0 if merged), and the relative `error`.

    Raises:
        UserError: not a run, unfinished, or with a round whose residual was not kept.
    """
    from fedex_scale.federation.export import export_run

    return export_run(
        Path(path_of(run, "run")), Path(path_of(out, "out")), rank=rank, merged=merged, dtype=dtype
    )


def plan(
    config: Source,
    overrides: Overrides | None = None,
    *,
    gpus: int | None = None,
    gpu_memory: str | None = None,
    host_memory: str | None = None,
    nvme: str | None = None,
    tflops: float | None = None,
) -> Plan:
    """Say what a run needs of a machine, from its sizes alone, as `fedex-scale plan` does.

    Args:
        config, overrides: as for `run`.
        gpus: how many; none: as here. 0 GB of memory each means ranks on a CPU.
        gpu_memory, host_memory, nvme: such as 80GB; none: as here.
        tflops: that training reaches on a GPU; none: 40% of an A100.

    Returns:
        `chosen.fits`, `chosen.needs` (bytes by component and place), `others` (with each DeepSpeed
        file), `remedy` (the cheapest change that fits, or None).

    Raises:
        UserError: settings that cannot be, or a model whose config cannot be had.
    """
    from fedex_scale.config.load import load_config

    settings = load_config(config, overrides)  # before imports that take seconds

    from fedex_scale.planning.choice import make_plan
    from fedex_scale.planning.machine import describe_machine

    return make_plan(settings, describe_machine(gpus, gpu_memory, host_memory, nvme, tflops))


def _begins(config: Config) -> str:
    """Return the first line of a run, which is told before anything is loaded."""
    rounds = config.federation.rounds
    return (
        f"{config.run.path}: {config.method.name}, {rounds} round{'s' * (rounds > 1)}, on "
        f"{config.model.path}; loading"
    )
