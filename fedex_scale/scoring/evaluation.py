"""Score the model on the running engine with lm-eval; no second model is loaded."""

from __future__ import annotations

import difflib
import json
import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.settings import EvaluationSection
from fedex_scale.config.shipped import shipped
from fedex_scale.config.words import named
from fedex_scale.data.sources import cause_of
from fedex_scale.data.suites import data_root, files_below
from fedex_scale.runtime import distributed, door
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import building
from fedex_scale.scoring import stock_tasks
from fedex_scale.scoring.spread import Tell, spread_requests, tell_nobody
from fedex_scale.tasks.predict import is_partitioned

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

TASKS_DIR = shipped("tasks")
BOOTSTRAPS = 1000  # for standard errors that have no formula; a mean's has one


def check_tasks(section: EvaluationSection, positions: int | None = None) -> None:
    """Raise a UserError for an unknown task or missing data, before anything is generated.

    Args:
        positions: that the model has, and a task's answers must leave some of.
    """
    if section.include_path is not None and not Path(section.include_path).is_dir():
        raise UserError(
            f"evaluation.include_path: expected a directory with tasks, found none at "
            f"{named(section.include_path)}; correct the path"
        )
    if not section.tasks:
        return
    _check_files(section)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(section)
    for name in section.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {TASKS_DIR}"
            if name.endswith((".yaml", ".yml")):
                hint = "name it by its `task`, and its directory in evaluation.include_path"
            raise UserError(f"evaluation.tasks: unknown task {name}; {hint}")
    if section.num_fewshot and all(map(is_ours, section.tasks)):
        raise UserError(
            "evaluation.num_fewshot: expected 0 or none, as none of evaluation.tasks is a stock "
            f"task and this project's have no examples, got {section.num_fewshot}"
        )
    with tempfile.TemporaryDirectory() as scratch, _metrics_from_afar():
        tasks = [x for name in section.tasks for x in _load(name, section, manager, Path(scratch))]
    if positions is not None:
        _check_positions(tasks, positions)
    loaded = [task.config.task for task in tasks]
    for task in loaded:
        if loaded.count(task) > 1:
            raise UserError(f"evaluation.tasks: {task} is there twice, alone or in a group")
    for task in section.data or {}:
        if task not in loaded:
            raise UserError(f"evaluation.data: {task} is not among evaluation.tasks")


def check_batch_size(section: EvaluationSection, *, partitioned: bool) -> None:
    """Raise a UserError for a batch size that ranks which hold the model together cannot find."""
    several = partitioned and distributed.world_size() > 1
    if section.tasks and section.batch_size == "auto" and several:
        raise UserError(
            "evaluation.batch_size: auto cannot be tried out under ZeRO-3 on several ranks, "
            "which would wait for each other; give a number"
        )


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    section: EvaluationSection,
    tell: Tell = tell_nobody,
) -> dict[str, Any]:
    """Return lm-eval's results on rank 0, nothing elsewhere; every rank must take part.

    Each example is answered on one rank. Random state and training mode are left as they were.

    Args:
        tell: called after each of this rank's answers.

    Raises:
        UserError: settings that cannot work together.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    check_batch_size(section, partitioned=is_partitioned(model))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # The commit of whatever repository one stands in says nothing, and git complains where none is.
    evaluator.get_git_commit_hash = lambda: None
    with (
        as_it_was(model),
        torch.no_grad(),
        tempfile.TemporaryDirectory() as scratch,
        _metrics_from_afar(),
    ):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=_wants_bos(model))
        spread_requests(lm, section.batch_size, tell)
        manager = _task_manager(section)
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=[_spec(name, section, manager, Path(scratch)) for name in section.tasks],
            task_manager=manager,
            limit=section.limit,
            num_fewshot=section.num_fewshot,  # ours have 0, which lm-eval keeps
            bootstrap_iters=BOOTSTRAPS,
        )
    return results or {}  # lm-eval answers on the first rank of a machine only


@contextmanager
def _metrics_from_afar() -> Iterator[None]:
    """Let no task's metric be Python code of a directory that happens to lie where one stands."""
    import evaluate as metrics

    real = metrics.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).exists():
            raise UserError(
                f"evaluation.tasks: the metric {path} would be run from {Path(path).resolve()}, "
                "which lies where you are; start from another directory"
            )
        return real(path, *args, **kwargs)

    metrics.load = load
    try:
        yield
    finally:
        metrics.load = real


def write_results(results: dict[str, Any], directory: Path) -> None:
    """Write results.json in lm-eval's format and one line a sample in samples.jsonl.

    Both or neither; the directory must not be there.
    """
    if not distributed.is_main():
        return
    samples = results.pop("samples", {})
    with building(directory, num_bytes=0) as scratch:
        text = json.dumps(results, indent=2, default=str) + "\n"
        (scratch / "results.json").write_text(text, encoding="utf-8")
        with (scratch / "samples.jsonl").open("x", encoding="utf-8") as file:
            for task, rows in samples.items():
                for row in rows:
                    line = row if "verdict" in row else _sample(task, row)
                    file.write(json.dumps(line, default=str) + "\n")


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Return what is a mean over examples as `task/metric`, or `task/metric/filter`, -> value."""
    return {
        "/".join([task, *metric.removesuffix(",none").split(",")]): value
        for task, metrics in results.get("results", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave training mode and every random state as they are now."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    for module, training in modes:
        module.training = training


def warnings(results: dict[str, Any]) -> list[str]:
    """Return a line for each task some of whose answers cannot be read, and what was left out."""
    unparsed = [
        f"{task}: the answers of {value} rows cannot be read; they count as wrong"
        for task, metrics in results.get("results", {}).items()
        for metric, value in metrics.items()
        if metric.startswith("unparsed_gold,") and value and task in results["configs"]
    ]
    return unparsed + results.get("notes", [])


def _sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return lm-eval's record of a sample in short: what was asked, written, read and judged."""
    return {
        "task": task,
        "filter": row["filter"],
        "doc_id": row["doc_id"],
        "doc_hash": row["doc_hash"],
        "prompt": row["arguments"][0][0],
        "output": [output for outputs in row["resps"] for output in outputs],
        "answer": row["filtered_resps"],
        "target": row["target"],
        "verdict": {metric: row[metric] for metric in row["metrics"]},
    }


def _wants_bos(model: nn.Module) -> bool | None:
    """Gemma fails without its begin token; other models get it if their tokenizer says so."""
    return True if model.config.model_type.startswith("gemma") else None


def _load(
    name: str, section: EvaluationSection, manager: TaskManager, scratch: Path
) -> list[ConfigurableTask]:
    """Load a task or group with its rows, and return its tasks."""
    try:
        tasks = list(manager.load([_spec(name, section, manager, scratch)])["tasks"].values())
        for task in tasks:
            _check_examples(task, section)
        return tasks
    except UserError:
        raise
    except Exception as error:  # whatever the hub, or a task's own code, makes of missing rows
        raise UserError(
            f"task {name}: its rows cannot be had ({cause_of(error)}); check the network or the "
            "hub's cache, or name its files in evaluation.data"
        ) from None


def _check_examples(task: ConfigurableTask, section: EvaluationSection) -> None:
    """Raise a UserError where lm-eval could not draw as many examples as a prompt has."""
    shots = task.config.num_fewshot
    if section.num_fewshot is not None and shots != 0:
        shots = section.num_fewshot
    rows = len(list(task.fewshot_docs())) if shots else 0
    if shots and rows < shots:
        raise UserError(
            f"task {task.config.task}: expected at least {shots} rows to take examples from, got "
            f"{rows}; set evaluation.num_fewshot or name other data"
        )


def _check_positions(tasks: list[ConfigurableTask], positions: int) -> None:
    """Raise a UserError where lm-eval would find no room for a prompt before an answer."""
    for task in tasks:
        most = (task.config.generation_kwargs or {}).get("max_gen_toks", 256)  # lm-eval's own
        if task.config.output_type == "generate_until" and most >= positions:
            raise UserError(
                f"task {task.config.task}: expected a model with more positions than the {most} "
                f"tokens of an answer, got {positions}; name another task or model"
            )


def _spec(name: str, section: EvaluationSection, manager: TaskManager, scratch: Path) -> str:
    """Return the task's name, or a YAML that includes a stock task and reads local files."""
    entry = manager.task_index[name]
    if is_ours(name) or not entry.yaml_path or not stock_tasks.scored_split(entry.cfg):
        return name
    shots = entry.cfg.get("num_fewshot") if section.num_fewshot is None else section.num_fewshot
    named, root = (section.data or {}).get(name), data_root(section.data_dir)
    files = stock_tasks.local_files(name, entry.cfg, shots or 0, named=named, root=root)
    if not files:
        return name
    changed = {"include": str(entry.yaml_path), "task": name, "num_fewshot": shots}
    path = scratch / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changed | stock_tasks.reading(files, entry.cfg)))
    return str(path)


def is_ours(task: str) -> bool:
    """Tell whether a task comes along."""
    return (TASKS_DIR / f"{task}.yaml").is_file()


def _check_files(section: EvaluationSection) -> None:
    for task, files in (section.data or {}).items():
        if isinstance(files, dict) and is_ours(task):
            raise UserError(f"evaluation.data: {task}: expected one file, got {files}; name it")
        for file in files.values() if isinstance(files, dict) else [files]:
            if not Path(str(file)).is_file():
                raise UserError(f"evaluation.data: {task}: no file {file}; correct the path")


def digests(section: EvaluationSection) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of the user's files that are scored on, by what to call them."""
    files = [section.generate] if section.generate else []
    for own in (section.data or {}).values():
        files += own.values() if isinstance(own, dict) else [own]
    if section.tasks:
        files += map(str, files_below(data_root(section.data_dir), section.tasks))
    return {f"evaluation data {file}": door.digest(file) for file in files}


def _task_manager(section: EvaluationSection) -> TaskManager:
    """Return lm-eval's list of tasks, which tells ours where local rows lie."""
    ours = all(map(is_ours, section.tasks))
    return _cached_manager(ours, json.dumps(section.data), section.data_dir, section.include_path)


@cache
def _cached_manager(
    ours: bool, data: str, data_dir: str | None, include_path: str | None
) -> TaskManager:
    """Return the list; reading the thousands of stock ones takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=[str(TASKS_DIR), *([include_path] if include_path else [])],
        include_defaults=not ours,
        metadata={"data": json.loads(data), "data_dir": data_dir},
    )
