"""A GPU that is not there: tensors that know their device and their shape, and hold nothing.

torch's fake tensors refuse what a real GPU would refuse: an operation on tensors of two devices.
What depends on values that are not there is answered: a number is 1, and nothing is zero. A process
that imports this believes to have an accelerator, so that it should do nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedex_scale.files.tensorfile import SafetensorsReader
from fedex_scale.runtime import distributed

_setup_privateuseone_for_python_backend("fakegpu")
GPU = torch.device("fakegpu", 0)
WAITS: list[str] = []  # for what the program has waited


class _Answers(TorchDispatchMode):
    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _note_waits(func, args, kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            where = [torch.arange(n, device=args[0].device) for n in args[0].shape]
            return torch.cartesian_prod(*where).view(-1, len(where))
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor)


def _note_waits(func: Callable, args: tuple, kwargs: dict) -> None:
    aten = torch.ops.aten
    if func in (aten._local_scalar_dense.default, aten.nonzero.default):
        if args[0].device == GPU:
            WAITS.append(str(func))
    elif func in (aten._to_copy.default, aten.copy_.default):
        here, there = args[0].device, kwargs.get("device") or args[-1].device
        waits = not kwargs.get("non_blocking", func is aten.copy_.default and len(args) > 2)
        if {here, torch.device(there)} == {GPU, torch.device("cpu")} and waits:
            WAITS.append(f"{func} from {here} to {there}")


_read = SafetensorsReader.read


def _read_really(*args: object) -> Tensor:
    with _disable_current_modes():
        return _read(*args)


_tensor = torch.tensor


def _tensor_by_way_of_the_cpu(*args: object, device: object = None, **kwargs: object) -> Tensor:
    return _tensor(*args, device="cpu", **kwargs).to(device or torch.get_default_device())


def _apply(module: nn.Module, change: Callable, recurse: bool = True) -> nn.Module:
    """Do what nn.Module does, which cannot set a fake parameter's data."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = change(parameter.detach())
                part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Let the program compute on a GPU that is not there; real tensors count as the CPU's."""
    with (
        patch.object(distributed, "device", lambda: GPU),
        patch.object(SafetensorsReader, "read", _read_really),
        patch.object(torch, "tensor", _tensor_by_way_of_the_cpu),
        patch.object(nn.Module, "_apply", _apply),
        FakeTensorMode() as fakes,
        _Answers(fakes),
    ):
        yield GPU
