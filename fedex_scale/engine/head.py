"""The training loss without all logits: of the trained tokens alone, and of a piece at a time.

A prompt's tokens need no logits, and with a large vocabulary the others' are the largest tensors of
a training step. The output layer is frozen, so that a piece's gradient can be taken with its loss;
then its logits go. torch's own `linear_cross_entropy` cannot cap logits, as Gemma-2 does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedex_scale.data.batching import MASKED

# Types that were seen to have the loss that is computed here (tests/unit/test_head.py).
TYPES = ("gemma", "gemma2", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# Numbers of a piece's logits: as fast as all at once, 128 MiB in float32; and on a GPU, where a
# piece of 128 rows would take as long to read the layer's weight as to compute.
PIECE, GPU_PIECE = 2**25, 2**27


def compute_loss_in_pieces(model: PreTrainedModel) -> None:
    """Let a frozen model that is given labels return its loss, and no logits.

    The loss is the model's own but for float32's rounding: the sum over tokens whose label is not
    masked, divided by `num_items_in_batch`. A model of another type, or whose output layer is
    adapted, is left as it is.
    """
    head = model.get_output_embeddings()
    if model.config.model_type not in TYPES or type(head) is not nn.Linear:
        return
    head.__class__, head.cap = _Head, getattr(model.config, "final_logit_softcapping", None)
    model.__class__ = _with_loss_in_pieces(type(model))


@cache
def _with_loss_in_pieces(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class with another way to its loss, under its own name."""

    @wraps(cls.forward)  # transformers looks at the signature
    def forward(self, *args, labels=None, num_items_in_batch=None, **inputs):
        if labels is None:
            return cls.forward(self, *args, **inputs)
        hidden = self.get_decoder()(*args, **inputs).last_hidden_state
        following = functional.pad(labels[:, 1:], (0, 1), value=MASKED).flatten()
        trained = (following != MASKED).nonzero().squeeze(1)
        targets, rows = (send(x, hidden.device) for x in (following[trained], trained))
        loss = self.get_output_embeddings()(hidden.flatten(0, 1)[rows], targets)
        return CausalLMOutputWithPast(loss=loss / (num_items_in_batch or max(1, len(trained))))

    # Labels may be on the CPU, so that none has to be waited for to know how many are trained.
    names = {"labels_stay": True, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {"forward": forward, **names})


def rows_of_a_piece(vocabulary: int, device: str) -> int:
    """Return of how many tokens logits are there at once, whole tiles of 128 if it can be."""
    rows = max(1, (PIECE if device == "cpu" else GPU_PIECE) // vocabulary)
    return rows - rows % 128 if rows >= 128 else rows


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU's tensor on a device, without waiting until it is there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Head(nn.Linear):
    """An output layer that gives the sum of losses where it is given targets."""

    cap: float | None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        # Within the layer's own call, as ZeRO-3 has its weight at hand then and only then.
        if targets is None:
            return super().forward(hidden)
        rows = rows_of_a_piece(self.out_features, hidden.device.type)
        return _SumOfLosses.apply(hidden, targets, self.logits, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().forward(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class _SumOfLosses(torch.autograd.Function):
    """Cross-entropy summed over rows of (N, H), float32; the gradient is ready with the loss."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, logits_of: Callable, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if not ctx.needs_input_grad[0]:
            for x, y in zip(hidden.split(rows), targets.split(rows), strict=True):
                total += functional.cross_entropy(logits_of(x).float(), y, reduction="sum")
            return total
        gradient = torch.empty_like(hidden)
        for x, y, into in zip(
            hidden.split(rows), targets.split(rows), gradient.split(rows), strict=True
        ):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                loss = functional.cross_entropy(logits_of(x).float(), y, reduction="sum")
            into.copy_(*torch.autograd.grad(loss, x))
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_loss).to(gradient.dtype), None, None, None
