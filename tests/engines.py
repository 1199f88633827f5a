"""A real engine of a small model, as tests want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedex_scale.config.learning import EngineSection, LoraSection, ModelSection
from fedex_scale.engine.build import Engine, build_engine


def build(
    path: str | Path,
    *,
    lora: LoraSection,
    dtype: str = "float32",
    deepspeed: str | None = None,
    **changes: Any,
) -> Engine:
    """Return an engine with plain settings but for the changes, which `build_engine` takes."""
    settings = {
        "trains": frozenset("AB"),
        "side_rank": 0,
        "optimizer": "adamw",
        "micro_batch_size": 1,
        "accumulation": 1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    model = ModelSection(path=str(path), dtype=dtype)
    return build_engine(model, lora, EngineSection(deepspeed=deepspeed), **settings | changes)
