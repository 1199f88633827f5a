"""Attention of examples that lie end to end in one row: each by itself, without a mask of all.

For such a row transformers makes a mask of all tokens by all tokens, and computes what it masks. An
example needs its own square of it. With CUDA, in 16 bits and without soft capping, torch's
`varlen_attn` takes all examples at once; elsewhere each is a call of the attention that the model
has otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedex_scale.engine.head import send

NAME = "by_example"
VARLEN_WIDTH = 256  # of a head, at most


Told = Callable[[Mapping[str, Tensor]], dict[str, Any]]


@contextmanager
def attending(model: PreTrainedModel, device: torch.device, *, packed: bool) -> Iterator[Told]:
    """Let a model attend by example, if its batches are packed ones.

    Gives what tells its attention of a batch on the CPU, by the names of transformers: one with
    position_ids (1, T), which begin at 0 with each example.
    """
    config = model.config
    before = config._attn_implementation
    ours = packed and before in ("eager", "sdpa")  # the others know of examples themselves

    def told(batch: Mapping[str, Tensor]) -> dict[str, Any]:
        if not packed:
            return {}
        begins = (batch["position_ids"][0] == 0).nonzero().flatten()
        ends = torch.cat([begins, torch.tensor([batch["position_ids"].shape[1]])])
        lengths, places = ends.diff().tolist(), send(ends.to(torch.int32), device)
        own = {"example_lengths": lengths, "attends_by": before} if ours else {}
        own |= {f"cu_seq_lens_{x}": places for x in "qk"}
        return own | {f"max_length_{x}": max(lengths) for x in "qk"}

    if ours:  # no mask is made for a name that transformers has none for
        config._attn_implementation = NAME
    try:
        yield told
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    example_lengths: list[int],
    attends_by: str,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' functions do: queries (1, H, T, D) to an output (1, T, H, D)."""
    if attends_by == "sdpa" and _varlen_can(query, kwargs.get("dropout", 0.0)):
        from torch.nn.attention.varlen import varlen_attn

        packed = (x[0].transpose(0, 1) for x in (query, key, value))
        most, back = max_length_q, -1 if sliding_window is None else sliding_window - 1
        out = varlen_attn(
            *packed,
            cu_seq_lens_q,
            cu_seq_lens_q,
            most,
            most,
            scale=kwargs.get("scaling"),
            window_size=(back, 0),
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out[None], None
    inner, eager = _inner(module, attends_by), attends_by == "eager"
    parts, examples = [], (x.split(example_lengths, dim=2) for x in (query, key, value))
    for q, k, v in zip(*examples, strict=True):
        mask = _mask(q.shape[2], sliding_window, q.device, q.dtype, eager=eager)
        window = {} if sliding_window is None else {"sliding_window": sliding_window}
        parts.append(inner(module, q, k, v, mask, **window, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def _varlen_can(query: Tensor, dropout: float) -> bool:
    fits = query.shape[-1] <= VARLEN_WIDTH and query.shape[-1] % 8 == 0
    return query.is_cuda and query.dtype.itemsize == 2 and fits and not dropout


def _inner(module: nn.Module, name: str) -> Any:
    if name == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sys.modules[type(module).__module__].eager_attention_forward


@lru_cache(maxsize=256)
def _mask(
    length: int, window: int | None, device: torch.device, dtype: torch.dtype, *, eager: bool
) -> Tensor | None:
    """Return the mask of one example (1, 1, L, L), or None where being causal is all."""
    windowed = window is not None and window < length
    if not (eager or windowed):
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    if windowed:
        seen = seen.triu(1 - window)
    if not eager:
        return seen[None, None]
    mask = torch.zeros(length, length, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
