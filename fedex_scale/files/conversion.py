"""How transformers loads the weights of a checkpoint that it renames or converts on the way.

The files of some models (ViT, Gemma-3 with images, mixed experts) hold their weights under names
of older versions, or in other pieces than the modules do. What belongs to which is asked of
transformers' own table, by the model's shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class Loaded(NamedTuple):
    """A weight of the model: its shape there, and its name in the files if it is just renamed."""

    shape: tuple[int, ...]
    source: str | None


def loaded_weights(directory: Path, names: Iterable[str]) -> dict[str, Loaded]:
    """Return the weights that a model gets from its files, by their names in the model.

    Nothing for a model that transformers does not know.

    Args:
        directory: of the model; just its config.json is read.
        names: of the weights in its files.
    """
    model = _without_weights(directory)
    if model is None:
        return {}
    shapes, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
    converters = [x for x in transforms if isinstance(x, WeightConverter)]
    targets = {pattern: x.target_patterns for x in converters for pattern in x.source_patterns}
    found: dict[str, Loaded] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which it is loaded
        given = (renamings, converters, prefix, shapes)
        renamed, pattern = rename_source_key(name, *given)
        if renamed not in shapes and name in shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, shapes)
        made = [renamed] if pattern is None else _all_made(renamed, targets[pattern])
        for weight in made:
            if weight in shapes:
                alone = pattern is None and weight not in found
                found[weight] = Loaded(tuple(shapes[weight].shape), name if alone else None)
    return found


def _all_made(first: str, targets: list[str]) -> list[str]:
    """Return the names of all weights that are made of one; `first` has the first one's."""
    return [first.replace(targets[0], target, 1) for target in targets]


def _without_weights(directory: Path) -> PreTrainedModel | None:
    """Return the model that config.json describes, on the meta device."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            return None
        with torch.device("meta"):
            return cls(config)
    except Exception:  # of another version, with code of its own, or settings that contradict
        return None
