"""What a kind of task says of itself; nothing above this room asks for more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import transformers
from datasets import Dataset
from torch import Tensor, nn

Loss = Callable[[nn.Module, dict[str, Tensor], int], Tensor]
"""Gives a batch's share of a step's loss: its sum over units, divided by the units of the step."""


class Examples(Protocol):
    """A client's examples, ready to be put into batches.

    Attributes:
        lengths: of each example, by which batches are grouped, and which progress counts.
        units: of each example, what the loss is a mean of: trained tokens, or the example itself.
        notes: what partition.json says of the whole, a digest of all examples included.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def units(self) -> np.ndarray: ...

    @property
    def notes(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> Examples: ...

    def batch(self, indices: Sequence[int], *, fallback: int) -> dict[str, Tensor]:
        """Return one micro-batch.

        Args:
            fallback: the example to run without labels where `indices` is empty.
        """


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How a model did on held-out rows.

    Fields:
        values: metric -> value, by the name of the rows.
        counts: how many rows each name has.
        samples: a line a row, in the form of samples.jsonl.
        notes: what was left out, and why.
    """

    values: dict[str, dict[str, float]]
    counts: dict[str, int]
    samples: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def causal_loss(model: nn.Module, batch: dict[str, Tensor], units: int) -> Tensor:
    """Return the model's own loss of the trained tokens."""
    return model(**batch, use_cache=False, num_items_in_batch=units).loss


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """Which model a task needs.

    Fields:
        auto: name of transformers' class that builds it.
        task_type: what PEFT calls its kind; None: nothing.
        loss: of a batch.
        settings: of the model's config, such as its labels.
        has_head: some modules are trained whole beside the adapter.
        head: their names; none: all that the model has beside its base model.
        everything: the whole model is trained so, and there is no adapter.
        seed: for those that the checkpoint does not have.
    """

    auto: str = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    loss: Loss = causal_loss
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_head: bool = False
    head: tuple[str, ...] = ()
    everything: bool = False
    seed: int = 0

    @property
    def model_class(self) -> type:
        return getattr(transformers, self.auto)


CAUSAL = ModelKind()


Score = Callable[[nn.Module, int], Scores]
"""Scores the model on held-out rows, in batches of so many; every rank must take part."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its rows read.

    Fields:
        rows: the training rows, of which each example is made from one, in the same order.
        score: None: there are no held-out rows.
    """

    model: ModelKind
    rows: Dataset
    examples: Examples
    score: Score | None = None
