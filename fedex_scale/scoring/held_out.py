"""Score the model on the task's held-out rows, in lm-eval's form, for all that reads results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedex_scale.config.settings import EvaluationSection
from fedex_scale.scoring.evaluation import as_it_was
from fedex_scale.tasks.interface import Scores

BATCH = 32  # where evaluation.batch_size is auto


def evaluate(
    model: nn.Module, score: Callable[[nn.Module, int], Scores], section: EvaluationSection
) -> dict[str, Any]:
    """Return the results on every rank; every rank must take part.

    Random state and training mode are left as they were.
    """
    size = BATCH if section.batch_size == "auto" else section.batch_size
    with as_it_was(model), torch.no_grad():
        model.eval()
        scores = score(model, size)
    return {
        "results": {
            name: {f"{metric},none": value for metric, value in values.items()}
            for name, values in scores.values.items()
        },
        "n-samples": {name: {"effective": count} for name, count in scores.counts.items()},
        "configs": {},
        "samples": {"": scores.samples},
        "notes": list(scores.notes),
    }


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return two results as one."""
    if not (one and other):
        return one or other
    parts = ("results", "n-samples", "configs", "samples")
    return one | other | {part: one.get(part, {}) | other[part] for part in parts}
