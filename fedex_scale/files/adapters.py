"""LoRA adapters on disk: ordinary PEFT directories, read and written one layer at a time.

Everything that travels between clients and server has this form: a client's result, the server's
adapter, a round's residual factors (as an adapter of scaling 1) and the side adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedex_scale.files.patterns import Matcher
from fedex_scale.files.peft_config import CONFIG_FILE, read_config
from fedex_scale.files.tensorfile import (
    MAX_TENSORS,
    SafetensorsReader,
)
from fedex_scale.methods.algebra import Pair, align, all_finite, lora_scaling
from fedex_scale.runtime.errors import UserError

WEIGHTS_FILE = "adapter_model.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PREFIX = "base_model.model."


class Adapter:
    """A PEFT LoRA directory, opened lazily: no tensor is read before it is asked for.

    Layers may differ in rank and alpha (`rank_pattern`, `alpha_pattern`). One whose config adapts
    nothing (`target_modules: []`) holds whole weights alone, as a run without an adapter writes it.

    Attributes:
        rank: the highest of all layers.
        scaling: of layers that no pattern names.
        layers: names of the adapted modules in the base model.
        full_weights: names, in the file, of whole weights that come along (`modules_to_save`).
        base_copies: names, in the file, of weights of the base itself, and what the base calls
            them: PEFT saves that of an adapted output layer beside its factors.

    Args:
        most_tensors: that its file may hold.

    Raises:
        UserError: the directory, its config or its weights cannot be used; the message names it.
    """

    def __init__(self, directory: str | Path, *, most_tensors: int = MAX_TENSORS) -> None:
        self.path = Path(directory)
        self.config = read_config(self.path)
        self.scaling = self._scaling(self.config["r"], self.config["lora_alpha"])
        self._matcher, self._ranks = Matcher(self.path / CONFIG_FILE), dict[str, int]()
        try:
            self.file = SafetensorsReader(self.path / WEIGHTS_FILE, most_tensors=most_tensors)
        except OSError:
            raise UserError(
                f"{self.path}: expected {WEIGHTS_FILE}, found none; save the adapter as safetensors"
            ) from None
        self.layers = tuple(self._layer_names())
        self.base_copies: dict[str, str] = {}
        self.full_weights = tuple(self._full_weights())
        if not self.layers and self.config.get("target_modules") != []:
            raise UserError(
                f"{self.path}: expected LoRA weights, found none; is it a LoRA adapter?"
            )
        varies = bool(self.config.get("rank_pattern"))
        self.rank: int = max(map(self.rank_of, self.layers)) if varies else self.config["r"]

    def pair(self, layer: str) -> Pair:
        """Return A (R, I) and B (O, R) of one layer, in the dtype of the file."""
        self.shapes(layer)
        return Pair(*(self.file.read(factor_name(layer, name)) for name in "AB"))

    def weights(self, name: str) -> Pair | Tensor:
        """Return a layer's factors, or a whole weight by its name in the base model."""
        key = f"{PREFIX}{name}"
        return self.file.read(key) if key in self.full_weights else self.pair(name)

    def full_block(self, name: str, span: tuple[int, int]) -> Tensor:
        """Return some elements of a whole weight, by its name in the file."""
        (block,) = self.file.blocks(name, span)
        return block

    def full_specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every whole weight, by its name in the file."""
        entries = self.file.entries
        return {name: (entries[name].dtype, entries[name].shape) for name in self.full_weights}

    def shapes(self, layer: str) -> tuple[int, int]:
        """Return (O, I) of one layer without reading its tensors."""
        A, B = (self._shape(layer, name) for name in "AB")
        rank = self.rank_of(layer)
        if len(A) != 2 or len(B) != 2 or (A[0], B[1]) != (rank, rank):
            raise UserError(
                f"{self.path}, layer {layer}: expected matrices of rank {rank}, got shapes "
                f"{A} and {B}; only linear layers can be aggregated"
            )
        if not (B[0] and A[1]):
            raise UserError(f"{self.path}, layer {layer}: expected numbers, got shapes {A} and {B}")
        return B[0], A[1]

    def rank_of(self, layer: str) -> int:
        if layer not in self._ranks:
            pattern = self.config.get("rank_pattern")
            self._ranks[layer] = self._matcher.first(pattern, layer, self.config["r"])
        return self._ranks[layer]

    def alpha_of(self, layer: str) -> float:
        pattern = self.config.get("alpha_pattern")
        return self._matcher.first(pattern, layer, self.config["lora_alpha"])

    def not_targeted(self) -> list[str]:
        """Return layers that the file holds, but that PEFT would not load by the config."""
        wanted = self.config.get("target_modules")
        found = self._matcher.targets([] if wanted is None else wanted, self.layers)
        left_out = self.config.get("exclude_modules")
        if left_out:
            excluded = set(self._matcher.targets(left_out, found))
            found = [layer for layer in found if layer not in excluded]
        numbers = self.config.get("layers_to_transform")
        if numbers is not None:
            numbers = {numbers} if isinstance(numbers, int) else set(numbers)
            found = [layer for layer in found if self._number_of(layer) in numbers]
        there = set(found)
        return [layer for layer in self.layers if layer not in there]

    def _number_of(self, layer: str) -> int | None:
        """Return which of the model's layers a module lies in, as PEFT reads its name."""
        blocks = self.config.get("layers_pattern") or ()
        blocks = {blocks} if isinstance(blocks, str) else set(blocks)
        parts = layer.split(".")
        for place in range(len(parts) - 2, 0, -1):
            if parts[place].isdecimal() and (not blocks or parts[place - 1] in blocks):
                return int(parts[place])
        return None

    def scaling_of(self, layer: str) -> float:
        """Return what B A of one layer is multiplied by."""
        alpha = self.alpha_of(layer)
        return self._scaling(self.rank_of(layer), alpha)

    def _scaling(self, rank: int, alpha: float) -> float:
        return lora_scaling(rank, alpha, rslora=bool(self.config.get("use_rslora")))

    def _shape(self, layer: str, factor: str) -> tuple[int, ...]:
        try:
            return self.file.entries[factor_name(layer, factor)].shape
        except KeyError:
            raise UserError(
                f"{self.path}: layer {layer} is missing; every client must adapt the same layers"
            ) from None

    def _layer_names(self) -> Iterator[str]:
        entries = self.file.entries
        names = [name for name in entries if name.startswith(PREFIX)]
        for name in names:
            if ".lora_" in name and entries[name].dtype not in _FLOATS:
                raise UserError(
                    f"{self.path}, {name}: expected float32, float16, bfloat16 or float64, got "
                    f"{str(entries[name].dtype).removeprefix('torch.')}; save the adapter so"
                )
        As, Bs = (
            [name[len(PREFIX) : -len(end)] for name in names if name.endswith(end)]
            for end in (".lora_A.weight", ".lora_B.weight")
        )
        for layer in sorted(set(As) ^ set(Bs)):
            there, missing = "AB" if layer in As else "BA"
            raise UserError(
                f"{self.path}, layer {layer}: expected lora_A and lora_B, found lora_{there} "
                f"without lora_{missing}; save or send the adapter again"
            )
        yield from As

    def _full_weights(self) -> Iterator[str]:
        layers = set(self.layers)
        for name in self.file.entries:
            if name.endswith((".lora_A.weight", ".lora_B.weight")) and name.startswith(PREFIX):
                continue
            if "lora_" in name or not name.startswith(PREFIX):
                raise UserError(
                    f"{self.path}: expected lora_A.weight and lora_B.weight of linear layers, got "
                    f"{name}, which cannot be aggregated; train plain LoRA on linear layers"
                )
            module, _, kind = name.removeprefix(PREFIX).rpartition(".")
            owner = module.removesuffix(".base_layer")
            if owner != module or owner in layers:
                self.base_copies[name] = f"{owner}.{kind}"
            else:
                yield name


class LayerPairs(Sequence[Pair]):
    """One layer's pairs of all clients, each loaded when it is indexed and then forgotten.

    Pairs are aligned: padded to `rank`, and scaled so that `scaling` applies to all of them.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        layer: str,
        *,
        rank: int,
        scaling: float,
        device: torch.device,
    ) -> None:
        self._adapters, self._layer, self._device = adapters, layer, device
        self._rank, self._scaling = rank, scaling

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, k: int) -> Pair:  # type: ignore[override]
        adapter = self._adapters[k]
        pair = adapter.pair(self._layer)
        for name, factor in zip("AB", pair, strict=True):
            if not all_finite(factor):
                raise UserError(
                    f"{adapter.path}, layer {self._layer}: expected finite numbers, got NaN or Inf "
                    f"in lora_{name}; leave this client out"
                )
        pair = Pair(*(factor.to(self._device) for factor in pair))
        scaling = adapter.scaling_of(self._layer)
        return align(pair, scaling, rank=self._rank, to_scaling=self._scaling)


def base_name(name: str) -> str:
    """Return what the base model calls a weight that an adapter's file holds."""
    return name.removeprefix(PREFIX)


def out_of_range(layer: str) -> UserError:
    return UserError(
        f"layer {layer}: expected finite numbers, got NaN or Inf in the result, whose numbers are "
        "beyond float32's range; leave out the adapters with the largest numbers"
    )


def factor_name(layer: str, factor: str) -> str:
    return f"{PREFIX}{layer}.lora_{factor}.weight"
