"""LoRA adapters written, one layer at a time, as ordinary PEFT directories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedex_scale.files.adapters import PREFIX, WEIGHTS_FILE, Adapter, factor_name, out_of_range
from fedex_scale.files.peft_config import CONFIG_FILE
from fedex_scale.files.tensorfile import (
    SafetensorsWriter,
    TrimmedWriter,
)
from fedex_scale.methods.algebra import LowRank, Pair, all_finite, stack


class AdapterWriter:
    """Writes a PEFT directory layer by layer; no more than one layer is ever in memory.

    Args:
        directory: made if need be; complete once the `with` block is left.
        shapes: layer name -> (O, I).
        rank: R of every layer.
        alpha: lora_alpha to write; give `alpha=rank` where B already holds the scaling.
        base: name or path of the base model, for adapter_config.json.
        dtype: of the file.
        settings: of adapter_config.json besides, or instead.
        full_weights: dtype and shape of whole weights that come along, by their name in the file.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        alpha: float,
        base: str,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        dtype: torch.dtype = torch.float32,
        settings: Mapping[str, Any] | None = None,
        full_weights: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        specs = dict(full_weights or {})
        for layer, (rows, columns) in shapes.items():
            specs[factor_name(layer, "A")] = (dtype, (rank, columns))
            specs[factor_name(layer, "B")] = (dtype, (rows, rank))
        config = peft_config(
            shapes,
            rank=rank,
            alpha=alpha,
            base=base,
            use_rslora=use_rslora,
            fan_in_fan_out=fan_in_fan_out,
        ) | dict(settings or {})
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self._writer = SafetensorsWriter(directory / WEIGHTS_FILE, specs)

    def write(self, layer: str, pair: Pair | Tensor) -> None:
        """Write a layer's factors, or a whole weight; a UserError where one is not finite."""
        if isinstance(pair, Tensor):
            self._writer.write(f"{PREFIX}{layer}", pair)
            return
        check_finite(layer, pair)
        self._writer.write(factor_name(layer, "A"), pair.A_RI)
        self._writer.write(factor_name(layer, "B"), pair.B_OR)

    def write_all(self, pairs: Mapping[str, Pair | Tensor]) -> None:
        """Write every layer and whole weight, where they are in memory."""
        tensors = {}
        for layer, pair in pairs.items():
            if isinstance(pair, Tensor):
                tensors[f"{PREFIX}{layer}"] = pair
            else:
                tensors |= {factor_name(layer, x): f for x, f in zip("AB", pair, strict=True)}
        self._writer.write_whole(tensors)

    def write_full(self, name: str, blocks: Iterator[Tensor]) -> None:
        """Write a whole weight that comes along, as flat parts."""
        self._writer.write_blocks(name, blocks)

    def write_sum(self, layer: str, pieces: Iterable[LowRank]) -> None:
        """Write low-rank factors, U as B and V as A, filled up with zeros to the rank."""
        U_OP, V_PI = stack(*pieces)
        missing = self._rank - V_PI.shape[0]
        self.write(layer, Pair(pad(V_PI, (0, 0, 0, missing)), pad(U_OP, (0, missing))))

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)


class PartWriter:
    """Writes low-rank matrices, layer by layer, as a PEFT directory whose layers differ in rank.

    Args:
        max_rank: columns that no layer exceeds.
        dtype: of the file.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, int]],
        *,
        max_rank: int,
        dtype: torch.dtype,
        base: str,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._shapes, self._base = directory, shapes, base
        self._ranks: dict[str, int] = {}
        largest = {}
        for layer, (rows, columns) in shapes.items():
            largest[factor_name(layer, "A")] = (dtype, (max_rank, columns))
            largest[factor_name(layer, "B")] = (dtype, (rows, max_rank))
        self._writer = TrimmedWriter(directory / WEIGHTS_FILE, largest)

    def write(self, layer: str, part: LowRank) -> None:
        """Write U as B and V as A; nothing becomes a column of zeros, which PEFT can load."""
        missing = 0 if part.V_PI.shape[0] else 1
        self._writer.write(factor_name(layer, "A"), pad(part.V_PI, (0, 0, 0, missing)))
        self._writer.write(factor_name(layer, "B"), pad(part.U_OP, (0, missing)))
        self._ranks[layer] = part.V_PI.shape[0] + missing

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, error: object, *rest: object) -> None:
        self._writer.__exit__(error, *rest)
        if not error:
            rank = max(self._ranks.values())
            other = {layer: own for layer, own in self._ranks.items() if own != rank}
            config = peft_config(self._shapes, rank=rank, alpha=rank, base=self._base)
            config |= {"rank_pattern": other, "alpha_pattern": other}
            (self._directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    alpha: float,
    base: str,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """Return adapter_config.json of plain LoRA on these layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": use_rslora,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "target_modules": target_suffixes(shapes),
    }


def full_specs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[torch.dtype, tuple]]:
    """Return `AdapterWriter`'s full_weights of weights by their names in the base model."""
    return {f"{PREFIX}{name}": (torch.float32, shape) for name, shape in shapes.items()}


def write_joined(
    directory: Path,
    adapters: Sequence[Adapter],
    *,
    base: str,
    fan_in_fan_out: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter that does what all of them do together, layer by layer.

    Its rank is the sum of theirs and its scaling 1: B holds each one's scaling. Whole weights are
    the first one's.
    """
    first = adapters[0]
    rank = sum(adapter.rank for adapter in adapters)
    shapes = {layer: first.shapes(layer) for layer in first.layers}
    with AdapterWriter(
        directory,
        shapes,
        rank=rank,
        alpha=rank,
        base=base,
        fan_in_fan_out=fan_in_fan_out,
        settings=settings,
        full_weights=first.full_specs(),
    ) as writer:
        for name in first.full_weights:
            writer.write_full(name, first.file.blocks(name))
        for layer in first.layers:
            pairs = [(x.pair(layer).float(), x.scaling_of(layer)) for x in adapters]
            writer.write_sum(layer, [LowRank(pair.B_OR * s, pair.A_RI) for pair, s in pairs])


def check_finite(layer: str, pair: Pair) -> None:
    """Raise a UserError for a result beyond the range of its numbers."""
    if not all_finite(*pair):
        raise out_of_range(layer)


def target_suffixes(layers: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Return the distinct last names of the layers, as PEFT's `target_modules` wants them."""
    return sorted({layer.rsplit(".", 1)[-1] for layer in layers})
