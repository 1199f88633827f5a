"""What a model's training holds and computes, found by running it without weights or a GPU.

On torch's meta device every operation runs on shapes alone. A dispatch mode sees each tensor come
and go, so that what autograd keeps for any architecture is counted and not guessed, with gradient
checkpointing or without.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.engine import lora_model, models, whole
from fedex_scale.engine.head import rows_of_a_piece
from fedex_scale.engine.lora_model import CLIENT, SIDE
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks.interface import CAUSAL, ModelKind


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How many numbers a model and its adapters have.

    Fields:
        base: of the frozen base; `linear` of them in layers that quantization packs.
        largest: of its largest weight.
        client, side: of the two adapters; `trained` of the first, and of the head.
        head: of what is trained whole.
        shapes: (O, I) of each adapted layer.
        cached: keys and values of one token, where the model writes.
    """

    base: int
    linear: int
    largest: int
    client: int
    side: int
    trained: int
    head: int
    shapes: dict[str, tuple[int, int]]
    cached: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """One micro-batch, forward and backward.

    Fields:
        kept_bytes: what the forward pass leaves for the backward pass, without the logits.
        logits_bytes: what the loss holds of the logits at once, in float32.
        peak_bytes: the most at any moment; weights and gradients do not count.
        flops: multiplications and additions, what is recomputed included.
    """

    kept_bytes: int
    logits_bytes: int
    peak_bytes: int
    flops: int


def shape_model(
    section: ModelSection,
    lora: LoraSection,
    *,
    dtype: torch.dtype,
    trains: frozenset[str],
    side_rank: int,
    has_planes: bool = False,
    fused: bool = True,
    kind: ModelKind = CAUSAL,
) -> PeftModel:
    """Return the adapted model on the meta device, as clients train on it in the last round.

    Args:
        side_rank: columns of the side adapter, 0 for none.
        has_planes: every layer has a second matrix instead.
        fused: adapted layers are one function each.

    Raises:
        UserError: its config cannot be had or read, or describes no model.
    """
    config = models.base_config(section, offline=True, kind=kind)
    try:
        with torch.device("meta"):
            base = kind.model_class.from_config(
                config,
                dtype=dtype,
                attn_implementation=models.attention(section, config),
                trust_remote_code=section.trust_remote_code,
            )
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: no model can be made of {section.path}'s config: {reason}"
        ) from None
    base.requires_grad_(False)
    rank = max(1, side_rank)
    with torch.device("meta"):  # PEFT would put the first adapter on the CPU
        model = lora_model.add_adapters(
            base, lora, trains=trains, side_rank=rank, kind=kind, fused=fused
        )
    if has_planes:
        for layer in lora_model.lora_layers(model).values():
            lora_model.make_plane(layer)
            shape = (layer.out_features, layer.in_features)
            plane_OI = torch.empty(shape, dtype=dtype, device="meta")
            layer.lora_B[SIDE].weight = nn.Parameter(plane_OI, requires_grad=False)
    if side_rank or has_planes:
        heads = whole.head_modules(base, kind)
        lora_model.activate(model, [CLIENT, SIDE], trains=trains, heads=heads)
    return model


def _cached(config: PretrainedConfig) -> int:
    """Return the numbers that generation keeps of a token in all layers; 0 where it is not told."""
    text = config.get_text_config()
    layers, heads = (getattr(text, x, 0) for x in ("num_hidden_layers", "num_attention_heads"))
    heads_kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(1, heads)
    return 2 * layers * heads_kept * width


def count_weights(model: PeftModel) -> Weights:
    """Count a model's numbers."""
    parts = {CLIENT: 0, SIDE: 0, "base": 0, "head": 0}
    largest = 0
    for name, parameter in model.named_parameters():
        part = next(
            (p for p in (CLIENT, SIDE) if f".lora_A.{p}." in name or f".lora_B.{p}." in name),
            "head" if parameter.requires_grad else "base",
        )
        parts[part] += parameter.numel()
        if part in ("base", "head"):
            largest = max(largest, parameter.numel())
    head = model.get_base_model().get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    packed = {id(m.weight): m.weight.numel() for m in linear if not m.weight.requires_grad}
    adapters = {id(p) for n, p in model.named_parameters() if ".lora_" in n}
    return Weights(
        base=parts["base"],
        linear=sum(count for key, count in packed.items() if key not in adapters),
        largest=largest,
        client=parts[CLIENT],
        head=parts["head"],
        side=parts[SIDE],
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        shapes=lora_model.shapes(lora_model.lora_layers(model)),
        cached=_cached(model.get_base_model().config) if head is not None else 0,
    )


def run_shapes(
    model: PeftModel,
    *,
    examples: int,
    length: int,
    checkpointing: bool,
    device: str = "cpu",
    kind: ModelKind = CAUSAL,
) -> Work:
    """Run a micro-batch forward and backward on shapes, and count.

    Args:
        examples: of the micro-batch, each of `length` tokens, without padding, or an image.
        device: the type of what it will run on, such as cuda.
    """
    base = model.get_base_model()
    if checkpointing and hasattr(base, "get_input_embeddings"):
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    elif base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
    model.train()
    labels = torch.zeros(examples, length, dtype=torch.int64)
    tokens = labels.to("meta")
    inputs = {"input_ids": tokens}
    mode = _Counter(model)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: mode.leave_out(p.grad))
        for p in model.parameters()
        if p.requires_grad
    ]
    if kind.has_head:
        return _run_with_head(model, mode, hooks, kind, inputs, examples)
    with _fused_attention(), mode:
        output = model(
            **inputs,
            labels=labels,
            use_cache=False,
            num_items_in_batch=examples * length,
        )
        loss, in_pieces = output.loss, output.logits is None
        vocabulary = base.config.get_text_config().vocab_size
        numbers = labels.numel() * vocabulary
        del output  # the engine lets go of the logits, too
        kept = mode.live_bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    # In float32. Of all at once the loss keeps the softmax, of pieces nothing.
    piece = rows_of_a_piece(vocabulary, device) * vocabulary
    logits = 4 * (min(numbers, piece) if in_pieces else numbers)
    return Work(
        kept_bytes=kept if in_pieces else max(0, kept - logits),
        logits_bytes=logits if in_pieces else min(kept, logits),
        peak_bytes=mode.peak_bytes,
        flops=mode.flops,
    )


def _run_with_head(
    model: PeftModel,
    mode: _Counter,
    hooks: list,
    kind: ModelKind,
    inputs: dict[str, Tensor],
    examples: int,
) -> Work:
    """Run a micro-batch whose loss is that of a few labels."""
    config = model.get_base_model().config
    number = torch.float32 if config.num_labels == 1 else torch.int64
    if kind.task_type is None:
        shape = (examples, getattr(config, "num_channels", 3), *_sides(config))
        inputs = {"pixel_values": torch.empty(shape, device="meta")}
    else:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["labels"] = torch.zeros(examples, dtype=number, device="meta")
    with _fused_attention(), mode:
        loss = kind.loss(model, inputs, examples)
        kept = mode.live_bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return Work(kept_bytes=kept, logits_bytes=0, peak_bytes=mode.peak_bytes, flops=mode.flops)


def _sides(config: PretrainedConfig) -> tuple[int, int]:
    """Return an image's height and width."""
    size = getattr(config, "image_size", None)
    if size is None:  # of a timm model
        size = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[1:]
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let sdpa be the kernel that keeps no matrix of scores, as CPUs and GPUs choose it."""

    def fused(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(query, key, value, 0.0, True)[0]

    with patch.object(functional, "scaled_dot_product_attention", fused):
        yield


_FLOPS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


class _Counter(TorchDispatchMode):
    """Counts the bytes of live tensors, and the operations' work."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        held = [*model.parameters(), *model.buffers()]
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # whether a mask is all ones: it is
        out = func(*args, **kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor no longer."""
        key = tensor.untyped_storage()._cdata
        self.live_bytes -= self._sizes.get(key, 0)
        self._sizes[key] = 0

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)
