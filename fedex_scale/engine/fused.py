"""A frozen linear layer and its adapters as one autograd function, in training.

PEFT computes every adapter apart: casts, two products, a scaling and a sum, each of which autograd
keeps. On a GPU a 7B model's micro-batch of 512 tokens is then bound by launches. Here the active
adapters' factors are stacked, so that a layer is three products forward and five more operations
backward, and nothing is kept but the input and its few projected columns.

Scoring stays PEFT's own, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional


class Stack(NamedTuple):
    """The active adapters' factors as they compute, one below the other, the client's first.

    Fields:
        A_PI, B_OP: in the input's dtype; B holds each adapter's scaling.
        rank: columns of the client's, the only ones that train.
    """

    A_PI: Tensor
    B_OP: Tensor
    rank: int


class FusedLinear(LoraLinear):
    """PEFT's layer; in training y = x (W + W2)^T + b + (x A^T) B^T at once.

    W2 is there where a frozen adapter is a whole matrix.
    """

    client: str
    held: Stack | None = None  # for the optimizer step that runs

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        usual = args or kwargs or self.disable_adapters or self.merged or not self.training
        usual = usual or self.client not in self.active_adapters
        if usual or x.dtype != self.get_base_layer().weight.dtype or _casts(x.device.type):
            return super().forward(x, *args, **kwargs)
        A, B = self.lora_A[self.client].weight, self.lora_B[self.client].weight
        dropped = self.lora_dropout[self.client](x)
        return _Products.apply(x, None if dropped is x else dropped, A, B, self)

    def second(self) -> Tensor | None:
        """Return W2, (O, I)."""
        return next(
            (self.lora_B[n].weight for n in self._frozen() if not self._is_low_rank(n)), None
        )

    def stack(self, dtype: torch.dtype) -> Stack:
        """Return the factors as they are, or as the running step holds them."""
        if self.held is not None:
            return self.held
        names = [self.client, *filter(self._is_low_rank, self._frozen())]
        A = [self.lora_A[name].weight.detach().to(dtype) for name in names]
        B = [self.lora_B[name].weight.detach() * self.scaling[name] for name in names]
        rank = len(A[0])
        if len(names) == 1:
            return Stack(A[0], B[0].to(dtype), rank)
        return Stack(torch.cat(A), torch.cat([b.to(dtype) for b in B], dim=1), rank)

    def _frozen(self) -> list[str]:
        return [name for name in self.active_adapters if name != self.client]

    def _is_low_rank(self, name: str) -> bool:
        return isinstance(self.lora_A[name], nn.Linear)


def _casts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def fuse(layer: LoraLayer, client: str) -> None:
    """Let a layer compute in one function where it can: not where it is packed or a Conv1D.

    Args:
        client: the adapter that trains; all others are frozen and have no dropout.
    """
    if type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = FusedLinear
        layer.client = client


def want_input_gradients(model: nn.Module) -> None:
    """Let every fused layer's input have a gradient in training, also where nothing asks for it."""

    def mark(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        if layer.training and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        return (x, *others)

    for layer in model.modules():
        if isinstance(layer, FusedLinear):
            layer.register_forward_pre_hook(mark)


@contextmanager
def stacks_held(layers: Iterable[LoraLayer], dtype: torch.dtype) -> Iterator[None]:
    """Stack every layer's factors once, for all micro-batches of one optimizer step.

    The factors must not change meanwhile.
    """
    fused = [layer for layer in layers if isinstance(layer, FusedLinear)]
    for layer in fused:
        layer.held = layer.stack(dtype)
    try:
        yield
    finally:
        for layer in fused:
            layer.held = None


class _Products(torch.autograd.Function):
    """Of x (..., I), what the client sees of it after dropout (or None), its A and B; (..., O)."""

    @staticmethod
    def forward(
        ctx, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, layer: FusedLinear
    ) -> Tensor:
        base, second, (A_PI, B_OP, rank) = (
            layer.get_base_layer(),
            layer.second(),
            layer.stack(x.dtype),
        )
        rows = x.reshape(-1, x.shape[-1])
        y = functional.linear(rows, base.weight, base.bias)
        if second is not None:
            y.addmm_(rows, second.t())
        if dropped is None:
            columns = rows @ A_PI.t()
        else:
            own = dropped.reshape(rows.shape) @ A_PI[:rank].t()
            columns = torch.cat([own, rows @ A_PI[rank:].t()], dim=1)
        y.addmm_(columns, B_OP.t())
        ctx.save_for_backward(x, dropped, columns)
        ctx.layer = layer
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, columns = ctx.saved_tensors
        layer: FusedLinear = ctx.layer
        A_PI, B_OP, rank = layer.stack(x.dtype)
        of_y = of_y.reshape(-1, of_y.shape[-1])
        of_columns = of_y @ B_OP
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = of_y @ layer.get_base_layer().weight
            if (second := layer.second()) is not None:
                of_x.addmm_(of_y, second)
            through = slice(0 if dropped is None else rank, None)
            of_x = of_x.addmm_(of_columns[:, through], A_PI[through]).view(x.shape)
        if dropped is not None:
            of_dropped = (of_columns[:, :rank] @ A_PI[:rank]).view(x.shape)
        rows = (x if dropped is None else dropped).reshape(len(of_y), -1)
        of_A, of_B = _gradients(ctx, rows, columns[:, :rank], of_columns[:, :rank], of_y)
        return of_x, of_dropped, of_A, of_B, None


def _gradients(
    ctx, rows_NI: Tensor, columns_NR: Tensor, of_columns_NR: Tensor, of_y_NO: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B that are wanted, in the dtype in which they train.

    They share one piece of memory, so that one operation casts both, or casts them and adds them to
    those of earlier micro-batches; then there is nothing to return.
    """
    layer, wanted = ctx.layer, ctx.needs_input_grad[2:4]
    A, B = layer.lora_A[layer.client].weight, layer.lora_B[layer.client].weight
    shapes = ((columns_NR.shape[1], rows_NI.shape[1]), (of_y_NO.shape[1], columns_NR.shape[1]))
    sizes = [math.prod(shape) * has for shape, has in zip(shapes, wanted, strict=True)]
    memory = rows_NI.new_empty(sum(sizes))
    of_A, of_B = memory.split(sizes)
    if wanted[0]:
        torch.mm(of_columns_NR.t(), rows_NI, out=of_A.view(shapes[0]))
    if wanted[1]:
        scaling = layer.scaling[layer.client]
        of_B.view(shapes[1]).addmm_(of_y_NO.t(), columns_NR, beta=0, alpha=scaling)
    earlier = _one_piece([f for f, has in zip((A, B), wanted, strict=True) if has], len(memory))
    if earlier is not None:
        earlier.add_(memory)
        return None, None
    parts = memory.to(A.dtype).split(sizes)
    return tuple(p.view(s) if n else None for p, s, n in zip(parts, shapes, sizes, strict=True))


def _one_piece(factors: list[Tensor], numel: int) -> Tensor | None:
    """Return the memory that the factors' gradients share, flat, if they fill it."""
    held = [factor.grad for factor in factors]
    if not held or any(grad is None for grad in held):
        return None
    pieces = {grad.untyped_storage()._cdata for grad in held}
    size = held[0].untyped_storage().nbytes()
    if len(pieces) > 1 or size != numel * held[0].element_size():
        return None
    return held[0].as_strided((numel,), (1,), 0)
