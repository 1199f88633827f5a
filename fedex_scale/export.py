"""What a finished run hands over: adapters that PEFT loads, and the base where it was changed."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from fedex_scale import distributed
from fedex_scale.adapters import Adapter, SafetensorsWriter, write_joined
from fedex_scale.config import Config
from fedex_scale.engine import Engine, read_base_weight
from fedex_scale.state import RunDir, ServerState


def write_final(config: Config, engine: Engine, run: RunDir, state: ServerState) -> dict[str, Path]:
    """Write final/adapter, final/exact_adapter and, where a fold changed it, final/base.

    final/adapter belongs on final/base if that exists, and on the untouched base otherwise.
    final/exact_adapter holds the server's adapter and every round's residual, for the untouched
    base whatever the fold mode; methods that replace the adapter keep their updates there too.

    Returns:
        What was written, by name, to show the user.
    """
    written = {}
    if distributed.is_main():
        adapter = Adapter(run.adapter(state.round))
        side = [Adapter(run.side(state.round))] if state.has_side else []
        rounds = range(1, state.round + 1)
        residuals = [Adapter(run.residual(r)) for r in rounds if run.residual(r).exists()]
        conv1d = any(layer.fan_in_fan_out for layer in engine.layers.values())
        for name, parts in (("adapter", side), ("exact_adapter", residuals)):
            path = run.final / name
            if parts:
                base = config.model.path
                write_joined(path, [adapter, *parts], base=base, fan_in_fan_out=conv1d)
            else:
                shutil.copytree(adapter.path, path)
            written[name] = path
    if state.base_changed:
        _write_base(config, engine, run.final / "base")
        written["base"] = run.final / "base"
    distributed.barrier()
    return written


def _write_base(config: Config, engine: Engine, out: Path) -> None:
    """Copy the base model's files with the changed weights in their place, in the run's dtype.

    Layer by layer: under ZeRO-3 one weight is gathered at a time. Every rank must take part.
    """
    source = base_directory(config.model.path, config.model.revision)
    changed = {f"{layer}.weight": layer for layer in engine.layers}
    if distributed.is_main():
        ignore = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pth", "*.gguf", ".*")
        shutil.copytree(source, out, ignore=ignore)
        config_file = out / "config.json"
        settings = json.loads(config_file.read_text())
        settings["dtype"] = str(engine.dtype).removeprefix("torch.")
        config_file.write_text(json.dumps(settings, indent=2) + "\n")
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors, ExitStack() as stack:
            names = list(tensors.keys())
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
            write = None
            if distributed.is_main():
                specs = {name: (engine.dtype, shape) for name, shape in shapes.items()}
                write = stack.enter_context(SafetensorsWriter(out / file.name, specs)).write
            for name in names:
                layer = changed.get(name)
                value = read_base_weight(engine, layer) if layer else None
                if write is not None:
                    write(name, tensors.get_tensor(name) if value is None else value)


def base_directory(path: str, revision: str | None = None) -> Path:
    """Return the directory of a model: itself, or the hub's snapshot in the cache."""
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, revision=revision, local_files_only=True))
