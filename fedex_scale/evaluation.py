"""Score the model on the running engine with lm-eval; no second model is loaded."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedex_scale import distributed
from fedex_scale.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TASKS_DIR = Path(__file__).parents[1] / "eval" / "tasks"


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is scored, and when."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks: this project's (eval/tasks) or stock ones; none: no scoring."""
    data: dict | None = None
    """Task name -> local .json or .jsonl file to score on, in place of the hub's data."""
    limit: int | None = None
    """Score the first so many examples of each task; none: all."""
    before: bool = True
    """Score before the first round, too."""
    every_rounds: int | None = None
    """Score after every so many rounds; none: after the last only."""
    batch_size: int = 16
    """Prompts generated at once."""

    def __post_init__(self) -> None:
        for name in ("limit", "every_rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"evaluation.{name}: expected at least 1 or none, got {value}")
        if self.batch_size < 1:
            raise UserError(f"evaluation.batch_size: expected at least 1, got {self.batch_size}")

    def due(self, round: int, rounds: int) -> bool:
        """Return whether the model is scored after `round` of `rounds` (0: before the first)."""
        if not self.tasks:
            return False
        if round == 0:
            return self.before
        return round == rounds or bool(self.every_rounds and round % self.every_rounds == 0)


def check_tasks(section: EvaluationSection) -> None:
    """Raise a UserError for an unknown task or missing data, before anything is trained."""
    if not section.tasks:
        return
    known = _task_manager(section.tasks).all_tasks
    for task in section.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see eval/tasks"
            raise UserError(f"evaluation.tasks: unknown task {task}; {hint}")
    for task, file in (section.data or {}).items():
        if task not in section.tasks:
            raise UserError(f"evaluation.data: {task} is not among evaluation.tasks")
        if not Path(file).is_file():
            raise UserError(f"evaluation.data: {task}: no file {file}; correct the path")


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, section: EvaluationSection
) -> dict[str, Any]:
    """Return lm-eval's results on rank 0, nothing elsewhere; every rank must take part.

    Every rank scores every example, so that under ZeRO-3 all ranks gather the same layers at the
    same time. Random state and training mode are left as they were.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as scratch:
        manager = _task_manager(section.tasks)
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=section.batch_size),
            tasks=[_task(name, section, manager, Path(scratch)) for name in section.tasks],
            task_manager=manager,
            limit=section.limit,
            bootstrap_iters=0,
        )
    model.train(was_training)
    return results or {}  # lm-eval answers on the first rank only


def write_results(results: dict[str, Any], directory: Path) -> None:
    """Write results.json in lm-eval's format and one line a sample in samples.jsonl."""
    if not distributed.is_main():
        return
    directory.mkdir(parents=True, exist_ok=True)
    samples = results.pop("samples", {})
    (directory / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    with (directory / "samples.jsonl").open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                file.write(json.dumps({"task": task, **row}, default=str) + "\n")


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Return each task's metrics as `task/metric` -> value."""
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in results.get("results", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def _task(name: str, section: EvaluationSection, manager: TaskManager, scratch: Path) -> str:
    """Return the task, or a YAML that includes it and reads the local file instead."""
    file = (section.data or {}).get(name)
    if file is None:
        return name
    path = scratch / f"{name}.yaml"
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}}
    include = str(manager.task_index[name].yaml_path)
    path.write_text(yaml.safe_dump({"include": include, "task": name, **data}))
    return str(path)


@cache
def _task_manager(tasks: tuple[str, ...]) -> TaskManager:
    """Return lm-eval's list of tasks; reading its thousands of stock ones takes seconds."""
    from lm_eval.tasks import TaskManager

    ours = all((TASKS_DIR / f"{task}.yaml").is_file() for task in tasks)
    return TaskManager(include_path=str(TASKS_DIR), include_defaults=not ours)
