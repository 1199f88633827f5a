"""LoRA adapters on disk: ordinary PEFT directories, read and written one layer at a time.

Everything that travels between clients and server has this form: a client's result, the server's
adapter, a round's residual factors (as an adapter of scaling 1) and the side adapter.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from fedex_scale.algebra import LowRank, Pair, align, lora_scaling, stack
from fedex_scale.errors import UserError

T = TypeVar("T")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    rank: int = 32
    """R, the rank of every adapted layer."""
    alpha: float = 16
    """The update is applied times alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module names, or `all-linear`: every attention and MLP projection."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank: expected at least 1, got {self.rank}; 32 is the paper's")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"lora.alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: expected 0 to below 1, got {self.dropout}")
        if not self.target_modules:
            raise UserError("lora.target_modules: expected names, got none; try all-linear")

    @property
    def scaling(self) -> float:
        return lora_scaling(self.rank, self.alpha, rslora=self.use_rslora)


class Adapter:
    """A PEFT LoRA directory, opened lazily: no tensor is read before it is asked for.

    Raises:
        UserError: the directory, its config or its weights cannot be used; the message names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self.config = _read_config(self.path)
        self.rank: int = self.config["r"]
        self.scaling = lora_scaling(
            self.rank, self.config["lora_alpha"], rslora=bool(self.config.get("use_rslora"))
        )
        try:
            self._file = safe_open(self.path / WEIGHTS_FILE, framework="pt")
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: expected {WEIGHTS_FILE}, found none; save the adapter as safetensors"
            ) from None
        except SafetensorError as error:
            raise UserError(
                f"{self.path / WEIGHTS_FILE}: damaged ({error}); send it again"
            ) from None
        self.layers = tuple(_layer_names(self._file.keys()))
        if not self.layers:
            raise UserError(
                f"{self.path}: expected LoRA weights, found none; is it a LoRA adapter?"
            )

    def pair(self, layer: str) -> Pair:
        """Return A (R, I) and B (O, R) of one layer, in the dtype of the file."""
        return Pair(*(self._get(layer, name, self._file.get_tensor) for name in "AB"))

    def shapes(self, layer: str) -> tuple[int, int]:
        """Return (O, I) of one layer without reading its tensors."""
        A, B = (self._get(layer, name, self._file.get_slice).get_shape() for name in "AB")
        return B[0], A[1]

    def _get(self, layer: str, factor: str, get: Callable[[str], T]) -> T:
        try:
            return get(f"{_PREFIX}{layer}.lora_{factor}.weight")
        except SafetensorError:
            raise UserError(
                f"{self.path}: layer {layer} is missing; every client must adapt the same layers"
            ) from None


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
            if not torch.isfinite(factor).all():
                raise UserError(
                    f"{adapter.path}, layer {self._layer}: expected finite numbers, got NaN or Inf "
                    f"in lora_{name}; leave this client out"
                )
        pair = Pair(*(factor.to(self._device) for factor in pair))
        return align(pair, adapter.scaling, rank=self._rank, to_scaling=self._scaling)


class AdapterWriter:
    """Writes a PEFT directory layer by layer; no more than one layer is ever in memory.

    Args:
        directory: made if need be; complete once the `with` block is left.
        shapes: layer name -> (O, I).
        rank: R of every layer.
        alpha: lora_alpha to write; give `alpha=rank` where B already holds the scaling.
        base: name or path of the base model, for adapter_config.json.
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
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        specs = {}
        for layer, (rows, columns) in shapes.items():
            specs[f"{_PREFIX}{layer}.lora_A.weight"] = (torch.float32, (rank, columns))
            specs[f"{_PREFIX}{layer}.lora_B.weight"] = (torch.float32, (rows, rank))
        config = {
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
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self._writer = SafetensorsWriter(directory / WEIGHTS_FILE, specs)

    def write(self, layer: str, pair: Pair) -> None:
        self._writer.write(f"{_PREFIX}{layer}.lora_A.weight", pair.A_RI)
        self._writer.write(f"{_PREFIX}{layer}.lora_B.weight", pair.B_OR)

    def write_sum(self, layer: str, pieces: Iterable[LowRank]) -> None:
        """Write low-rank factors, U as B and V as A, filled up with zeros to the rank."""
        U_OP, V_PI = stack(*pieces)
        missing = self._rank - V_PI.shape[0]
        self.write(layer, Pair(pad(V_PI, (0, 0, 0, missing)), pad(U_OP, (0, missing))))

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order.

    The header needs names, dtypes and shapes only, so the offsets are known beforehand; the
    library's own `save_file` wants every tensor at once.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._specs, self._offsets, end = dict(specs), {}, 0
        for name, (dtype, shape) in specs.items():
            size = dtype.itemsize * torch.Size(shape).numel()
            self._offsets[name] = end
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._start = self._file.tell()
        self._file.truncate(self._start + end)
        self._missing = set(specs)

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self._specs[name]
        assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(flat.numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._file.close()
        assert error or not self._missing, f"never written: {sorted(self._missing)[:3]}"


def write_joined(
    directory: Path, adapters: Sequence[Adapter], *, base: str, fan_in_fan_out: bool = False
) -> None:
    """Write one adapter that does what all of them do together, layer by layer.

    Its rank is the sum of theirs and its scaling 1: B holds each one's scaling.
    """
    first = adapters[0]
    rank = sum(adapter.rank for adapter in adapters)
    shapes = {layer: first.shapes(layer) for layer in first.layers}
    with AdapterWriter(
        directory, shapes, rank=rank, alpha=rank, base=base, fan_in_fan_out=fan_in_fan_out
    ) as writer:
        for layer in first.layers:
            pairs = [(adapter.pair(layer).float(), adapter.scaling) for adapter in adapters]
            writer.write_sum(layer, [LowRank(pair.B_OR * s, pair.A_RI) for pair, s in pairs])


def target_suffixes(layers: Mapping[str, object] | Sequence[str]) -> list[str]:
    """Return the distinct last names of the layers, as PEFT's `target_modules` wants them."""
    return sorted({layer.rsplit(".", 1)[-1] for layer in layers})


def _layer_names(keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        if key.startswith(_PREFIX) and key.endswith(".lora_A.weight"):
            yield key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")


def _read_config(path: Path) -> dict:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path}: expected a PEFT adapter directory, found no {CONFIG_FILE}"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: expected a LoRA adapter, got {config!r:.80}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    positive = isinstance(alpha, (int, float)) and 0 < alpha < float("inf")
    if not isinstance(rank, int) or rank < 1 or not positive:
        raise UserError(f"{file}: expected r >= 1 and a positive lora_alpha, got {rank}, {alpha}")
    return config
