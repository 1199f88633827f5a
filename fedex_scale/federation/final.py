"""What a finished run hands over: adapters that PEFT loads, and the base where it was changed."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedex_scale.config.settings import Config
from fedex_scale.engine.build import Engine
from fedex_scale.engine.contents import read_base_weight, set_single
from fedex_scale.engine.parameters import Source
from fedex_scale.federation.client import show
from fedex_scale.federation.facts import Facts
from fedex_scale.federation.history import History
from fedex_scale.federation.state import ServerState
from fedex_scale.files.adapter_writers import AdapterWriter, write_joined
from fedex_scale.files.adapters import Adapter, base_name
from fedex_scale.files.basefiles import WEIGHTS_FILE, BaseFiles, BaseWriter, base_directory
from fedex_scale.files.run_dir import RunDir
from fedex_scale.files.tensorfile import SafetensorsWriter
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.phases import phase

# Of a model's directory: what reads its inputs, and how it writes.
_BESIDE = ("tokenizer", "vocab", "merges", "special_tokens", "preprocessor", "generation", "spiece")


class Handed(NamedTuple):
    """The adapter that a run hands over, as the forward pass sees it.

    Fields:
        source: the factors by layer, float32, of one rank; what lacks columns has zeros.
        scaling: what B A is multiplied by.
        rank: of every layer.
    """

    source: Source
    scaling: float
    rank: int


def handed_over(run: RunDir, state: ServerState) -> Handed:
    """Return the server's adapter after a round, the side adapter's columns beside its own."""
    adapter = Adapter(run.adapter(state.round))
    history = History(run, state.round)
    more = 0
    if state.has_side and not state.base_changed:
        more = max(map(history.side_rank, adapter.layers))
    if not more:
        return Handed(adapter.weights, adapter.scaling, adapter.rank)
    rank = adapter.rank + more

    def joined(layer: str) -> Pair | Tensor:
        if layer not in adapter.layers:
            return adapter.weights(layer)
        own, side = adapter.pair(layer).float(), history.side(layer)
        A_RI = torch.cat([own.A_RI, side.A_RI])
        B_OR = torch.cat([own.B_OR * adapter.scaling, side.B_OR], dim=1)
        missing = rank - A_RI.shape[0]
        return Pair(pad(A_RI, (0, 0, 0, missing)), pad(B_OR, (0, missing)))

    return Handed(joined, 1.0, rank)


@phase("folding")
def show_handed_over(engine: Engine, run: RunDir, state: ServerState) -> None:
    """Let the engine compute as PEFT does with what the run would hand over after this round.

    With planes, which no adapter holds, it computes with both planes.
    """
    if engine.has_planes:
        show(engine, run, state)
        return
    adapter = handed_over(run, state)
    set_single(engine, adapter.source, scaling=adapter.scaling)


@phase("writing")
def write_final(config: Config, engine: Engine, run: RunDir, state: ServerState) -> dict[str, Path]:
    """Write final/adapter, final/exact_adapter and, where a fold changed it, final/base.

    With a head, final/config.json is the model's config with the labels' names.
    Every rank must take part.

    Without an adapter, final/model is the whole model, in float32.

    Returns:
        What was written, by name, to show the user.
    """
    if not engine.layers:
        return _write_model(config, engine, run, state)
    written = distributed.on_main(lambda: write_adapters(config, engine, run, state, run.final))
    if state.base_changed and not config.model.random:
        _write_base(config, engine, run.final / "base")
        written["base"] = run.final / "base"
    if engine.heads and distributed.is_main():  # the labels' names
        settings = engine.model.get_base_model().config
        for folder in (run.final, run.final / "base"):
            if folder.is_dir():
                settings.save_pretrained(folder)
    distributed.barrier()
    return written


def _write_model(
    config: Config, engine: Engine, run: RunDir, state: ServerState
) -> dict[str, Path]:
    """Write the server's weights as a model that transformers loads."""
    out, model = run.final / "model", engine.model.get_base_model()
    if distributed.is_main():
        server = Adapter(run.adapter(state.round))
        out.mkdir(parents=True)
        specs = {base_name(name): spec for name, spec in server.full_specs().items()}
        with SafetensorsWriter(out / WEIGHTS_FILE, specs) as writer:
            for name in server.full_weights:
                writer.write_blocks(base_name(name), server.file.blocks(name))
        model.config.save_pretrained(out)
        if not config.model.random:
            base = base_directory(config.model.path, config.model.revision)
            for file in base.iterdir():
                if file.name.startswith(_BESIDE) and file.is_file():
                    shutil.copy(file, out / file.name)
    distributed.barrier()
    return {"model": out}


def write_adapters(
    config: Config, facts: Facts, run: RunDir, state: ServerState, out: Path
) -> dict[str, Path]:
    """Write adapter and exact_adapter, of a run's final/; no model is needed.

    final/adapter is what was scored; it belongs on final/base if that exists, and on the untouched
    base otherwise. final/exact_adapter holds the server's adapter and every round's residual in
    float32, for the untouched base whatever the fold mode; methods that replace the adapter keep
    their updates there too. It is left out where the clients were too many to keep their residual.
    """
    written = {"adapter": out / "adapter"}
    server, handed = Adapter(run.adapter(state.round)), handed_over(run, state)
    if handed.rank == server.rank:
        shutil.copytree(server.path, written["adapter"])
    else:
        with AdapterWriter(
            written["adapter"],
            facts.shapes(),
            rank=handed.rank,
            alpha=handed.rank,
            base=config.model.path,
            fan_in_fan_out=facts.is_conv1d,
            settings=facts.settings,
            full_weights=server.full_specs(),
        ) as writer:
            for name in (*server.layers, *facts.whole_shapes()):
                writer.write(name, handed.source(name))
    if not rounds_without_factors(run, state.round):
        written["exact_adapter"] = out / "exact_adapter"
        write_joined(
            written["exact_adapter"],
            [server, *residuals_of(run, state.round)],
            base=config.model.path,
            fan_in_fan_out=facts.is_conv1d,
            settings=facts.settings,
        )
    return written


def _write_base(config: Config, engine: Engine, out: Path) -> None:
    """Copy the base model's files with the changed weights in their place, in the run's dtype.

    Planes become one weight in float32, as bf16 would round the second one away.

    Layer by layer: under ZeRO-3 one weight is gathered at a time. Every rank must take part.
    """
    try:
        base = BaseFiles(base_directory(config.model.path, config.model.revision))
        names = {layer: weight_of(base, layer) for layer in engine.layers}
    except UserError as error:
        raise UserError(
            f"final/base: {error}; meanwhile final/exact_adapter is for the untouched base"
        ) from None
    with ExitStack() as stack:
        dtype = torch.float32 if engine.has_planes else engine.dtype
        writer = BaseWriter(base, out, set(names.values()), dtype=dtype)
        stack.callback(writer.close)
        for layer, name in names.items():
            weight = read_base_weight(engine, layer)
            if distributed.is_main():
                writer.write(name, weight)
        if distributed.is_main():
            writer.finish()


def weight_of(base: BaseFiles, layer: str) -> str:
    name = base.find(layer)
    if name is None or base.is_tied(layer):
        raise UserError(
            f"{base.path}: expected the weight of layer {layer} in its files, found none of its "
            "own; use an adapter for the untouched base"
        )
    return name


def residuals_of(run: RunDir, last: int) -> list[Adapter]:
    paths = [run.residual(number) for number in range(1, last + 1)]
    return [Adapter(path) for path in paths if path.exists()]


def rounds_without_factors(run: RunDir, last: int) -> list[int]:
    """Return the rounds that changed more than the adapter, but kept no factors of the change."""
    missing = []
    for number in range(1, last + 1):
        has_factors = run.residual(number).exists()
        if not has_factors and run.round(number).residual_norm > 0:
            missing.append(number)
    return missing
