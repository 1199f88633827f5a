"""All kinds of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedex_scale.config.settings import Config
from fedex_scale.data.clients import Clients
from fedex_scale.data.partition import describe, split
from fedex_scale.methods.all import METHODS
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks import classify, generate, images, instruct
from fedex_scale.tasks.interface import CAUSAL, Examples, ModelKind, Score, Task

OPEN: dict[str, Callable[[Config, Any], Task]] = {
    "classify": classify.open_task,
    "regress": classify.open_task,
    "generate": generate.open_task,
    "images": images.open_task,
}
"""Those that are one table of rows; `instruct` reads what clients have."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learned, who learns it, and how it is scored on the task's own held-out rows."""

    model: ModelKind
    clients: Clients
    score: Score | None = None

    @property
    def largest_token(self) -> int:
        """0 where there are no tokens."""
        return max(getattr(part, "largest_token", 0) for part in self._parts)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, where there are tokens."""
        return max(int(part.lengths.max(initial=0)) for part in self._parts)

    @property
    def _parts(self) -> tuple[Examples, ...]:
        return (*self.clients.train, *self.clients.held_out.values())


def read_lesson(config: Config, processor: Any) -> Lesson:
    """Read a run's rows, make them examples, and deal them out.

    Args:
        processor: the model's tokenizer, or what makes its inputs of images.

    Raises:
        UserError: the rows cannot be had, or are not what the kind needs.
    """
    if config.task.kind == "instruct":
        return Lesson(model=CAUSAL, clients=instruct.read(config, processor))
    if config.partition.kind == "sites":
        raise UserError(
            f"partition.kind: sites expects task.kind=instruct, got {config.task.kind}; put the "
            "rows into one file, with a column that names the site, and set partition.kind=natural"
        )
    task = OPEN[config.task.kind](config, processor)
    kind = replace(task.model, seed=derive_seed(config.run.seed, "head"))
    return Lesson(model=kind, clients=_deal(config, task), score=task.score)


def _deal(config: Config, task: Task) -> Clients:
    parts = split(task.rows, config.partition, derive_seed(config.run.seed, "partition"))
    report = describe(parts, task.rows, config.partition.column) | dict(task.examples.notes)
    names = [f"client {client}" for client in range(len(parts))]
    if METHODS[config.method.name].one_client:
        parts = [sorted(index for part in parts for index in part)]
    return Clients(
        train=[task.examples.select(part) for part in parts],
        held_out={},
        names=names,
        schema=config.task.kind,
        report=report,
        notes=[],
    )


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
