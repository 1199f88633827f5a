"""One optimizer step, plain or DeepSpeed's alike, and the reset before the next client."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fedex_scale.engine.build import Engine
from fedex_scale.engine.by_example import attending
from fedex_scale.engine.contents import set_adapter
from fedex_scale.engine.fused import stacks_held
from fedex_scale.engine.head import send
from fedex_scale.engine.parameters import Source
from fedex_scale.runtime import distributed

_TABLES = ("qmap1", "qmap2")  # bitsandbytes' of what its 8 bits mean


def reset_for_client(engine: Engine, source: Source, *, side: bool) -> None:
    """Make the engine as if just built, with the given adapter: nothing of earlier clients stays.

    Drops the optimizer's moments and step counts as well. The learning rate is a function of the
    step and randomness is seeded by the client (client.py), so nothing else is left to reset.
    """
    set_adapter(engine, source, side=side)
    _zero_moments(engine.optimizer)
    (engine.deepspeed or engine).optimizer.zero_grad()


def _zero_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state to what it was before the first step, where it lies.

    Dropped, it would live on: ZeRO-2 and paged optimizers hold it as well.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in _TABLES:
                value.zero_()
            elif isinstance(value, int):
                state[name] = 0


@contextmanager
def moments_away(engine: Engine) -> Iterator[None]:
    """Hold no memory for the optimizer's moments on the device, between two rounds.

    They are as before the first step afterwards, as they would be made for the next client anyway.
    Pages of a paged optimizer leave the device by themselves, and offloaded ones are not on it.
    """
    rooms = [
        (storage, storage.nbytes())
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name not in _TABLES and value.device == engine.device
        if value.ndim and not value.is_pinned() and not getattr(value, "is_paged", False)
        for storage in [value.untyped_storage()]
        if storage.resizable()  # on a CPU not once a checkpoint was made of it
    ]
    for storage, _ in rooms:
        storage.resize_(0)
    try:
        yield
    finally:
        for storage, size in rooms:
            storage.resize_(size)
        _zero_moments(engine.optimizer)


def train_step(
    engine: Engine, micro_batches: Sequence[dict[str, Tensor]], *, units: int, lr: float
) -> float:
    """Do one optimizer step and return its loss, the mean over the step's units.

    Args:
        micro_batches: this rank's share; as many on every rank. A batch whose labels are all
            masked takes part with loss 0.
        units: trained tokens, or examples, in the whole step, over all ranks and micro-batches, so
            that the loss does not depend on how the examples are spread.
        lr: learning rate of this step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.model.train()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    ds, labels_stay = engine.deepspeed, getattr(engine.model.get_base_model(), "labels_stay", False)
    # A shard's layer is whole for a moment only, and stacks its factors anew.
    held = [] if engine.is_sharded else engine.layers.values()
    packed = engine.by_example and all("position_ids" in batch for batch in micro_batches)
    attends = attending(engine.model.get_base_model(), engine.device, packed=packed)
    with stacks_held(held, engine.dtype), attends as told:
        for i, batch in enumerate(micro_batches):
            here = ("labels",) if labels_stay else ()
            sent = {n: x if n in here else send(x, engine.device) for n, x in batch.items()}
            if ds is not None:
                ds.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            loss = engine.kind.loss(ds or engine.model, sent | told(batch), units)
            total += loss.detach()
            if ds is not None:
                # DeepSpeed averages gradients over ranks; the loss is already a share of the sum.
                ds.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            else:
                loss.backward()
    if engine.deepspeed is not None:
        engine.deepspeed.step()
    else:
        _plain_step(engine)
    return distributed.summed(total)


def _plain_step(engine: Engine) -> None:
    parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
    if distributed.world_size() > 1:
        flat = torch.cat([p.grad.view(-1) for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
    if engine.max_grad_norm > 0 and math.isfinite(engine.max_grad_norm):
        torch.nn.utils.clip_grad_norm_(parameters, engine.max_grad_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
