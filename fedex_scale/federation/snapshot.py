"""What a running client has in a rank's memory besides its adapter: moments and random states."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedex_scale.engine.build import Engine
from fedex_scale.files.tensorfile import SafetensorsReader, SafetensorsWriter
from fedex_scale.runtime import door

_ZERO3_MASTERS = "fp32_partitioned_groups_flat"


def write_snapshot(engine: Engine, path: Path) -> None:
    """Write this rank's optimizer state and random states."""
    tensors, numbers = _optimizer_state(engine)
    tensors |= _random_states(numbers)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, {"numbers": json.dumps(numbers)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def read_snapshot(engine: Engine, path: Path) -> None:
    """Set this rank's optimizer state and random states as they were written."""
    file = SafetensorsReader(path)
    tensors = {name: file.read(name) for name in file.entries}
    numbers = door.parse_json(file.metadata["numbers"])
    for i, parameter in enumerate(_masters(engine)):
        prefix = f"{i}."
        state = {
            name.removeprefix(prefix): tensor if _stays(name) else tensor.to(parameter.device)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        state |= {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
        if state:
            engine.optimizer.state[parameter] = state
    _set_random_states(tensors, numbers)


def snapshot_bytes(engine: Engine) -> int:
    """Return about how many bytes this rank will write."""
    return 2**16 + sum(tensor.nbytes for tensor in _optimizer_state(engine)[0].values())


def _masters(engine: Engine) -> list[Tensor]:
    """Return what the optimizer steps on; ZeRO-3 hands it over one by one, and hides it else."""
    sharded = getattr(getattr(engine.deepspeed, "optimizer", None), _ZERO3_MASTERS, None)
    return sharded or [p for group in engine.optimizer.param_groups for p in group["params"]]


def _optimizer_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors, numbers = {}, {}
    for i, parameter in enumerate(_masters(engine)):
        for name, value in engine.optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{i}.{name}"] = value
    return tensors, numbers


def _stays(name: str) -> bool:
    return name.endswith(".step")  # torch counts steps on the CPU


def _random_states(numbers: dict[str, float]) -> dict[str, Tensor]:
    """Return the random states of Python, numpy and torch; single numbers go to `numbers`."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    numbers["python.gauss"] = gauss
    numbers["numpy"] = [int(position), int(has_gauss), float(cached)]
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(tensors: dict[str, Tensor], numbers: dict) -> None:
    random.setstate((3, tuple(tensors["python"].tolist()), numbers["python.gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *numbers["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
