"""The training loss without all logits: of the trained tokens alone, and of a piece at a time.

A prompt's tokens need no logits, and with a large vocabulary the others' are the largest tensors of
a training step. The output layer is frozen, so that a piece's gradient can be taken with its loss;
then its logits go. torch's own `linear_cross_entropy` cannot cap logits, as Gemma-2 does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedex_scale.data.batching import MASKED

# Types that were seen to have the loss that is computed here (tests/unit/test_head.py).
TYPES = ("gemma", "gemma2", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
PIECE = 2**25  # numbers of a piece's logits: as fast as all at once, 128 MiB in float32


def compute_loss_in_pieces(model: PreTrainedModel) -> None:
    """Let a frozen model that is given labels return its loss, and no logits.

    The loss is the model's own but for float32's rounding: the sum over tokens whose label is not
    masked, divided by `num_items_in_batch`. A model of another type, or
    whose output layer is adapted, is left as it is.
    """
    head = model.get_output_embeddings()
    if model.config.model_type not in TYPES or type(head) is not nn.Linear:
        return
    own_forward, logits_of = model.forward, _capped(head.forward, model)

    @wraps(own_forward)  # transformers looks at the signature
    def forward(*args, labels=None, num_items_in_batch=None, **inputs) -> CausalLMOutputWithPast:
        if labels is None:
            return own_forward(*args, **inputs)
        hidden = model.get_decoder()(*args, **inputs).last_hidden_state
        following = functional.pad(labels[:, 1:], (0, 1), value=MASKED).flatten()
        trained = (following != MASKED).nonzero().squeeze(1)
        targets = following[trained].to(hidden.device)
        loss = head(hidden.flatten(0, 1)[trained.to(hidden.device)], targets)
        return CausalLMOutputWithPast(loss=loss / (num_items_in_batch or max(1, len(trained))))

    def head_forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        # Inside the layer's call, where ZeRO-3 has its weight at hand.
        if targets is None:
            return plain(hidden)
        return _SumOfLosses.apply(hidden, targets, logits_of, max(1, PIECE // head.out_features))

    plain, head.forward = head.forward, head_forward
    model.forward = forward


class _SumOfLosses(torch.autograd.Function):
    """Cross-entropy summed over rows of (N, H), float32; the gradient is ready with the loss."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, logits_of: Callable, rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
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


def _capped(linear: Callable[[Tensor], Tensor], model: PreTrainedModel) -> Callable:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return linear if cap is None else lambda hidden: cap * torch.tanh(linear(hidden) / cap)
