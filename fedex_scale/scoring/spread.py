"""Spread lm-eval's requests over the ranks: each is answered once, and every rank gets it.

lm-eval can shard examples itself, but then a batch holds other prompts than on one process, and a
task with fewer examples than ranks fails. Here every rank sees all requests, and whole batches,
the same that one process would make, are dealt out in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from fedex_scale.runtime import distributed
from fedex_scale.tasks.predict import is_partitioned

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

BatchSize = int | Literal["auto"]
Tell = Callable[[str, int, int], None]
"""Told of what is scored, how many of this rank's prompts are answered, and of how many."""
AUTO_ON_GPU, AUTO_ON_CPU = 256, 16  # tried first; memory that runs out can be caught on a GPU only


def tell_nobody(what: str, done: int, total: int) -> None:
    """Stand in where nobody looks on."""


def spread_requests(lm: HFLM, batch_size: BatchSize, tell: Tell = tell_nobody) -> None:
    """Let `lm` answer its requests together with the other ranks.

    Args:
        lm: holds the model, whole on each rank or partitioned over them by ZeRO-3.
        batch_size: at most; halved when memory runs out, unless ranks work in step. auto: large.
        tell: called after each answer of this rank.
    """
    lm.cache_hook = _Answered(tell)
    in_step = distributed.world_size() > 1 and is_partitioned(lm.model)
    if in_step:
        _wait_for_each_other(lm)
    for name, deal in (
        ("generate_until", _batches_of_prompts),
        ("loglikelihood", _batches_of_contexts),
        ("loglikelihood_rolling", _batches_of_contexts),
    ):
        finish = partial(_keep_up, lm, name) if in_step else lambda: None
        size = _first_size(lm, batch_size)
        answer = partial(_answer, lm, getattr(lm, name), deal, finish, size, not in_step)
        setattr(lm, name, answer)


class _Answered:
    """Counts answers in the place where lm-eval would keep each, once it has it."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._what, self._done, self._total = tell, "", 0, 0

    def begin(self, requests: Sequence[Instance]) -> None:
        tasks = {str(request.task_name) for request in requests}
        self._what = tasks.pop() if len(tasks) == 1 else f"{len(tasks)} tasks"
        self._done, self._total = 0, len(requests)
        self._tell(self._what, 0, self._total)

    def add_partial(self, *_: object) -> None:
        self._done += 1
        self._tell(self._what, min(self._done, self._total), self._total)


def _answer(
    lm: HFLM,
    answer: Callable[..., list],
    deal: Callable[..., list[list[int]]],
    finish: Callable[[], None],
    batch_size: int,
    may_shrink: bool,
    requests: list[Instance],
    **_: Any,
) -> list:
    """Return the answers to all requests, each made on one rank."""
    lm.batch_size_per_gpu = batch_size
    batches = deal(lm, requests, lm.batch_size_per_gpu)
    mine = batches[distributed.rank() :: distributed.world_size()]
    chosen = [index for batch in mine for index in batch]
    lm.cache_hook.begin([requests[i] for i in chosen])
    answers = _as_many_as_fit(lm, answer, [requests[i] for i in chosen], may_shrink)
    finish()
    by_index = dict(zip(chosen, answers, strict=True))
    if distributed.world_size() > 1:
        shares: list = [None] * distributed.world_size()
        dist.all_gather_object(shares, by_index)
        by_index = {index: value for share in shares for index, value in share.items()}
    return [by_index[index] for index in range(len(requests))]


def _as_many_as_fit(
    lm: HFLM, answer: Callable[..., list], requests: list[Instance], may_shrink: bool
) -> list:
    """Answer the requests, longest first; where that runs out of memory, in smaller batches."""
    while requests:
        try:
            return answer(requests, disable_tqdm=True)
        except torch.OutOfMemoryError:
            if not may_shrink or lm.batch_size_per_gpu == 1:
                raise
        torch.cuda.empty_cache()
        lm.batch_size_per_gpu //= 2
    return []


def _batches_of_prompts(lm: HFLM, requests: Sequence[Instance], size: int) -> list[list[int]]:
    """Return the batches, as indices, that lm-eval would make of all requests: longest first."""
    groups = defaultdict(list)
    for index, request in enumerate(requests):
        prompt, options = request.args
        groups[repr(options)].append((-len(lm.tok_encode(prompt)), prompt, index))
    batches = []
    for group in groups.values():
        order = [index for *_, index in sorted(group)]
        batches += [order[i : i + size] for i in range(0, len(order), size)]
    return batches


def _batches_of_contexts(lm: HFLM, requests: Sequence[Instance], size: int) -> list[list[int]]:
    """Return the requests by context, as lm-eval reads a context once for all its choices."""
    groups = defaultdict(list)
    for index, request in enumerate(requests):
        groups[request.args[0]].append(index)
    return list(groups.values())


def _first_size(lm: HFLM, batch_size: BatchSize) -> int:
    if batch_size != "auto":
        return batch_size
    return AUTO_ON_GPU if lm.device.type == "cuda" else AUTO_ON_CPU


def _wait_for_each_other(lm: HFLM) -> None:
    """Before each use of the model, say that this rank has work; `_keep_up` listens."""
    generate, call = lm._model_generate, lm._model_call

    def generate_in_step(*args: Any, **options: Any) -> torch.Tensor:
        _count_busy(True)
        return generate(*args, **options, synced_gpus=True)

    def call_in_step(*args: Any, **options: Any) -> torch.Tensor:
        _count_busy(True)
        return call(*args, **options)

    lm._model_generate, lm._model_call = generate_in_step, call_in_step


def _keep_up(lm: HFLM, kind: str) -> None:
    """Use the model on one token for as long as another rank needs it, whose gathers wait."""
    token = torch.tensor([[lm.eot_token_id]], device=lm.device)
    while _count_busy(False):
        if kind == "generate_until":
            options = {"max_new_tokens": 1, "do_sample": False, "synced_gpus": True}
            lm.model.generate(input_ids=token, attention_mask=token * 0 + 1, **options)
        else:
            lm.model(token)


def _count_busy(busy: bool) -> float:
    return distributed.sum_over_ranks(float(busy))[0]
