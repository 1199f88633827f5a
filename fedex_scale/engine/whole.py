"""Modules that are trained whole beside the adapter: found, drawn where they are new, kept apart.

PEFT calls them `modules_to_save`. Here the base's own modules are trained, without a copy beside
them, and files hold them as PEFT has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedex_scale.engine.parameters import write
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed
from fedex_scale.tasks.interface import ModelKind


def head_modules(model: PreTrainedModel, kind: ModelKind) -> tuple[str, ...]:
    """Return the names of the modules to be trained whole; none for a kind without a head.

    Raises:
        UserError: the model has none, or none of a name that the config asks for.
    """
    if kind.everything:
        return tuple(name for name, module in model.named_children() if list(module.parameters()))
    return new_modules(model, kind)


def new_modules(model: PreTrainedModel, kind: ModelKind) -> tuple[str, ...]:
    """Return the names of the modules that a checkpoint may lack: the head's."""
    if not kind.has_head:
        return ()
    modules = dict(model.named_modules())
    if kind.head:
        found = [n for n in modules for name in kind.head if f".{n}".endswith(f".{name}")]
        missing = [h for h in kind.head if not any(f".{n}".endswith(f".{h}") for n in found)]
        if missing:
            raise UserError(
                f"task.head: expected names of modules in {model.config.model_type}, got "
                f"{', '.join(missing)}, which match nothing; leave task.head out"
            )
        return tuple(n for n in found if not any(n.startswith(f"{other}.") for other in found))
    base = model.base_model_prefix
    found = [
        n for n, m in model.named_children() if n != base and any(True for _ in m.parameters())
    ]
    inner = getattr(model, "timm_model", None)
    if not found and inner is not None:
        found = [n for n, m in modules.items() if m is inner.get_classifier()]
    if not found:
        raise UserError(
            f"task.head: {model.config.model_type} has no module beside its base model; name the "
            "modules that are to be trained whole"
        )
    return tuple(found)


def parameters_of(model: nn.Module, heads: Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters below these modules, by their names in the base model."""
    named = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    return {n: p for n, p in named.items() if is_below(n, heads)}


def is_below(name: str, heads: Collection[str]) -> bool:
    return any(name.startswith(f"{head}.") for head in heads)


def check_missing(model: PreTrainedModel, heads: Collection[str], missing: Iterable[str]) -> None:
    """Raise a UserError where a weight is new that would stay as it was drawn, untrained."""
    lost = sorted(name for name in missing if not is_below(name, heads))
    if heads and lost:
        raise UserError(
            f"model.path: expected every weight but the head's in the files of "
            f"{model.config.name_or_path}, found none for {lost[0]}; name its module in task.head, "
            "beside the head, or choose another model"
        )


def draw(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Draw parameters as transformers would for a new model, the same whatever holds them.

    Args:
        names: parameters to be drawn.
    """
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if f"{path}.{n}" in names}
        if not own:
            continue
        fresh = {n: nn.Parameter(torch.empty(_shape(p))) for n, p in own.items()}
        module._parameters.update(fresh)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, path))
            model._init_weights(module)
        module._parameters.update(own)
        for name, parameter in own.items():
            write(parameter, fresh[name].data)


def train_in_float32(model: nn.Module, heads: Collection[str]) -> None:
    """Hold these modules in float32, for the optimizer, and let them take inputs of any dtype."""
    for name in heads:
        module = model.get_submodule(name)
        if not any(hasattr(p, "ds_tensor") for p in module.parameters()):
            module.float()
        module.register_forward_pre_hook(_as_its_weights)


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a whole parameter, partitioned or not."""
    return tuple(_shape(parameter))


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _as_its_weights(module: nn.Module, inputs: tuple) -> tuple:
    dtype = next(module.parameters()).dtype
    return tuple(_cast(inputs, dtype))


def _cast(inputs: Iterable, dtype: torch.dtype) -> Iterator:
    for value in inputs:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        yield value.to(dtype) if floating else value
