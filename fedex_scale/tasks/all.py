"""All kinds of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedex_scale.config.settings import Config
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks import classify, generate, images, instruct
from fedex_scale.tasks.interface import CAUSAL, ModelKind, Task

OPEN: dict[str, Callable[[Config, Any], Task]] = {
    "instruct": instruct.open_task,
    "classify": classify.open_task,
    "regress": classify.open_task,
    "generate": generate.open_task,
    "images": images.open_task,
}


def open_task(config: Config, processor: Any) -> Task:
    """Read a run's rows and make them examples.

    Args:
        processor: the model's tokenizer, or what makes its inputs of images.

    Raises:
        UserError: the rows cannot be had, or are not what the kind needs.
    """
    task = OPEN[config.task.kind](config, processor)
    kind = replace(task.model, seed=derive_seed(config.run.seed, "head"))
    return replace(task, model=kind)


def kind_without_rows(config: Config) -> ModelKind:
    """Return the kind of model, as far as it is known without rows: labels as the config has them.

    For plans, and for what is told before anything is read.
    """
    section = config.task
    if not section.has_head:
        return CAUSAL
    own = images.IMAGES if section.kind == "images" else classify.SEQUENCE
    count = 1 if section.kind == "regress" else len(section.labels)
    settings = {"num_labels": count} if count else {}
    return ModelKind(**own, settings=settings, has_head=True, head=section.head)
