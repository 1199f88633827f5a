"""What the server has to know of a model: four facts, which need no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedex_scale.aggregation.weights import Target
from fedex_scale.config.learning import LoraSection
from fedex_scale.files.adapter_writers import AdapterWriter, full_specs


class Facts(Protocol):
    """What the server asks; an engine answers, and so does `ModelFacts`, without one.

    Fields:
        side_rank: columns that the side adapter may come to have, 0 for none.
        has_planes: a second matrix beside each weight takes the side adapter's place.
        is_conv1d: layers are GPT-2's, for adapter_config.json.
        dtype: in which clients hold the side adapter.
    """

    side_rank: int
    has_planes: bool
    dtype: torch.dtype

    @property
    def is_conv1d(self) -> bool: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What adapter_config.json says of the task: PEFT's name for it, and the head."""
        ...

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (O, I) of every adapted layer."""
        ...

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter that is trained whole."""
        ...

    def whole_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Yield those parameters; every rank must take part."""
        ...


@dataclass(kw_only=True)
class ModelFacts:
    """The facts of a model that is not in memory."""

    layers: dict[str, tuple[int, int]]
    side_rank: int
    dtype: torch.dtype
    is_conv1d: bool
    has_planes: bool = False

    def shapes(self) -> dict[str, tuple[int, int]]:
        return self.layers

    @property
    def settings(self) -> dict[str, Any]:
        return {"task_type": "CAUSAL_LM"}

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def whole_weights(self) -> Iterable[tuple[str, Tensor]]:
        return ()


def no_weights(facts: Facts) -> dict[str, Target]:
    """Return targets that take no fold, of a server whose base is at the sites alone."""
    return {
        layer: Target(shape=shape, numel=shape[0] * shape[1], writable=False)
        for layer, shape in facts.shapes().items()
    }


def open_adapter(facts: Facts, directory: Path, lora: LoraSection, base: str) -> AdapterWriter:
    """Return a writer for an adapter of the run's rank and alpha over the model's layers."""
    return AdapterWriter(
        directory,
        facts.shapes(),
        rank=lora.rank,
        alpha=lora.alpha,
        base=base,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=facts.is_conv1d,
        settings=facts.settings,
        full_weights=full_specs(facts.whole_shapes()),
    )
