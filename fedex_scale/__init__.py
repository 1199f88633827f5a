"""Federated LoRA fine-tuning of 7B-9B models with exact (FedEx-LoRA) aggregation.

The names below are the interface, told of in docs/python.md. Importing the package imports none of
what they need.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedex_scale.api import (
        UserError,
        aggregate,
        aggregate_layer,
        evaluate,
        export,
        plan,
        run,
    )

__version__ = "0.1.0"
__all__ = ["UserError", "aggregate", "aggregate_layer", "evaluate", "export", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fedex_scale import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps `run` the function: importing the module run.py would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
