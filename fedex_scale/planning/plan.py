"""What a run needs of a machine: bytes by place and component, and time; from shapes alone.

A pure function of the model's config, the run's config and the machine. Figures are of one rank's
worst moment: a micro-batch of the longest examples, with all optimizer state there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedex_scale.aggregation.ranks import base_update_rank, side_rank_of
from fedex_scale.config.settings import Config
from fedex_scale.planning.footprint import Weights, Work
from fedex_scale.planning.machine import Machine

PLAIN = "none"
# Beside tensors, in bytes. Of a process: Python, torch and the libraries. Of a GPU: CUDA's context,
# cuBLAS' workspaces, and what the caching allocator cannot hand out again.
PROCESS_BYTES = 700_000_000
GPU_BYTES = 1_200_000_000
# Of a wide PCIe 4.0 link, and of a good NVMe disk.
LINK_BYTES_S, NVME_BYTES_S = 20e9, 3e9
SCORED_TOKENS = 1024  # of a prompt and its answer: the longest of GSM8K and MATH with 256 new ones
_MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
PLACES = ("gpu", "host", "nvme", "disk")


@dataclass(frozen=True, kw_only=True)
class Need:
    """One component, in bytes: on each GPU; in host RAM, on NVMe and on disk in all."""

    name: str
    gpu: float = 0
    host: float = 0
    nvme: float = 0
    disk: float = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one DeepSpeed file, or none, asks for.

    Fields:
        refused: why the engine does not take it, or None.
        step_s: of an optimizer step; None where there is no GPU.
        lacks: the places that do not hold it.
    """

    name: str
    needs: tuple[Need, ...] = ()
    refused: str | None = None
    step_s: float | None = None
    lacks: tuple[str, ...] = field(default=())

    def total(self, place: str) -> float:
        return sum(getattr(need, place) for need in self.needs)

    @property
    def fits(self) -> bool:
        return not (self.lacks or self.refused)


def estimate(
    config: Config,
    settings: Mapping[str, Any] | None,
    machine: Machine,
    weights: Weights,
    work: Work | None,
    dtype: torch.dtype,
    *,
    clients: int,
) -> Estimate:
    """Return what a run needs with one DeepSpeed file, and whether the machine has it.

    Args:
        settings: the file's content; None for plain PyTorch.
        work: of a micro-batch; None: leave activations out.
        clients: of a round.
    """
    name = Path(config.engine.deepspeed).stem if config.engine.deepspeed else PLAIN
    zero = (settings or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    refused = None
    if settings is not None and stage == 0 and dtype == torch.bfloat16:
        refused = "its bfloat16 masters cannot be reset"
    elif stage == 3 and config.model.quantization != "none":
        refused = "quantized weights cannot be sharded"
    needs = [
        *_weights(config, zero, machine, weights, work, dtype),
        *_training(config, settings, zero, machine, weights, dtype),
        *_activations(work),
        *_scoring(config, zero, machine, weights, work, dtype, clients),
        *_files(config, weights, dtype, clients),
        Need(name="processes", gpu=GPU_BYTES, host=machine.gpus * PROCESS_BYTES),
    ]
    if machine.is_cpu:  # all ranks' memory is the host's
        needs[-1] = replace(needs[-1], gpu=0)
        needs = [replace(n, gpu=0, host=n.host + machine.gpus * n.gpu) for n in needs]
    found = Estimate(name=name, needs=tuple(n for n in needs if any(getattr(n, p) for p in PLACES)))
    there = {
        "gpu": None if machine.is_cpu else machine.gpu_memory,
        "host": machine.host_memory,
        "nvme": machine.nvme,
        "disk": machine.disk,
    }
    lacks = [p for p, size in there.items() if size is not None and found.total(p) > size]
    if there["nvme"] is None and found.total("nvme"):
        lacks.append("nvme")
    step_s = _step_s(config, zero, machine, weights, work, dtype)
    return replace(found, refused=refused, lacks=tuple(lacks), step_s=step_s)


def _device(zero: Mapping[str, Any], key: str) -> str:
    return (zero.get(key) or {}).get("device", "none")


def _base_bytes(config: Config, weights: Weights, dtype: torch.dtype) -> float:
    """Return the size of the whole base: packed, its linear layers take 8 or 4 bits and scales."""
    packed = {"none": dtype.itemsize, "int8": 1.0, "nf4": 0.5 + 4 / 64}[config.model.quantization]
    return weights.linear * packed + (weights.base - weights.linear) * dtype.itemsize


def _weights(
    config: Config,
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    work: Work | None,
    dtype: torch.dtype,
) -> list[Need]:
    """Return where the base and its adapters lie, and what they need around them."""
    ranks, stage = machine.gpus, zero.get("stage", 0)
    base = _base_bytes(config, weights, dtype)
    sharded = stage == 3
    # Plain PyTorch trains the client adapter in float32; DeepSpeed has masters of its own.
    trained = weights.client + weights.head
    adapters = (dtype.itemsize if stage else 4) * trained + dtype.itemsize * weights.side
    # The server's on each rank, and on one the last client's until it is written.
    between = (ranks + 1) * 4 * trained
    needs = [
        Need(name="adapters", gpu=adapters / (ranks if sharded else 1)),
        Need(name="adapters between clients", host=between),
    ]
    away = _device(zero, "offload_param")
    if not sharded:
        needs.insert(0, Need(name="base", gpu=base))
        if config.engine.fused_lora and config.model.quantization == "none":
            low_rank = weights.client + (config.aggregate.fold != "planes") * weights.side
            needs.append(Need(name="stacked adapters", gpu=dtype.itemsize * low_rank))
    else:
        place = {"cpu": "host", "nvme": "nvme"}.get(away, "gpu")
        needs.insert(0, Need(name="base shard", **{place: base / (ranks if place == "gpu" else 1)}))
        needs += _gathered(zero, machine, weights, work, dtype)
        if away == "nvme":
            count = zero["offload_param"].get("buffer_count", 5)
            buffers = count * weights.largest * dtype.itemsize
            needs.append(Need(name="NVMe buffers", host=buffers))
    if config.aggregate.fold in ("carry", "planes") and dtype != torch.float32:
        folded = 4 * sum(o * i for o, i in weights.shapes.values())
        # The carry lies where the fold computes: on the device.
        needs.append(Need(name="carry plane", gpu=folded / (ranks if sharded else 1)))
    return needs


def _gathered(
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    work: Work | None,
    dtype: torch.dtype,
) -> list[Need]:
    """Return the room for weights that are whole for a while under ZeRO-3."""
    ranks, numbers = machine.gpus, weights.base + weights.client + weights.side
    at_hand = machine.is_cpu or _device(zero, "offload_param") == "none"
    if ranks == 1 and at_hand:
        return []  # a shard is the whole, and where it is computed with
    ahead = zero.get("stage3_prefetch_bucket_size", 5e7)
    most = max(zero.get("stage3_max_live_parameters", 1e9) + ahead, weights.largest)
    needs = [Need(name="gathered layers", gpu=dtype.itemsize * min(numbers, most))]
    if machine.is_cpu:  # gloo copies what it sends, and what it receives
        message = min(numbers, max(ahead, weights.largest))
        copies = dtype.itemsize * message * (1 + 1 / ranks)
        if work is not None and numbers <= most:
            # Nothing is gathered twice. The last copies are gone while the forward pass has as many
            # weights before it as are gathered ahead, and some of what it keeps is not there yet.
            later = work.kept_bytes * message / numbers
            copies = max(0, copies - later - work.logits_bytes - _backward_bytes(work))
        needs.append(Need(name="gathers' copies", gpu=copies))
    return needs


def _training(
    config: Config,
    settings: Mapping[str, Any] | None,
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    dtype: torch.dtype,
) -> list[Need]:
    """Return what the trained factors need."""
    ranks, stage = machine.gpus, zero.get("stage", 0)
    moments = _MOMENTS[config.train.optimizer] * weights.trained
    if not stage:
        # Plain PyTorch sums gradients over ranks in one flat copy, which is then cut up.
        copies = 2 if ranks > 1 else 1
        return [
            Need(name="gradients", gpu=4 * weights.trained * copies),
            Need(name="optimizer", gpu=moments),
        ]
    master = 4 * weights.trained
    local = (moments + master) / ranks
    # Reduced gradients, and their float32 copies for the step.
    sums = (settings or {}).get("data_types", {}).get("grad_accum_dtype")
    gradients = ((4 if sums == "fp32" else dtype.itemsize) + 4) * weights.trained / ranks
    # Buckets are allocated in full; with overlapping communication there are two in stage 2.
    buckets = zero.get("reduce_bucket_size", 5e8) * dtype.itemsize
    buckets = min(buckets, dtype.itemsize * weights.trained) if stage == 2 else buckets
    buckets *= 2 if stage == 2 and zero.get("overlap_comm") and not machine.is_cpu else 1
    if _device(zero, "offload_optimizer") == "cpu":
        return [
            Need(name="gradients", gpu=buckets, host=gradients * ranks),
            Need(name="optimizer", host=local * ranks),
        ]
    return [
        Need(name="gradients", gpu=buckets + gradients),
        Need(name="optimizer", gpu=local),
    ]


def _activations(work: Work | None) -> list[Need]:
    if work is None:
        return []
    return [
        Need(name="activations", gpu=work.kept_bytes),
        Need(name="logits", gpu=work.logits_bytes),
        Need(name="work of the backward pass", gpu=_backward_bytes(work)),
    ]


def _backward_bytes(work: Work) -> float:
    return max(0, work.peak_bytes - work.kept_bytes - work.logits_bytes)


def _scoring(
    config: Config,
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    work: Work | None,
    dtype: torch.dtype,
    clients: int,
) -> list[Need]:
    """Return what scoring takes beyond the activations and moments of training.

    That is the adapter, float32, with the server's columns and all of the side adapter's (planes
    are scored as they are), and keys and values of one prompt: fewer are answered at once where
    memory runs out, but for ranks that hold the model together and wait for each other.
    """
    if not config.evaluation.tasks:
        return []
    in_step = zero.get("stage", 0) == 3 and machine.gpus > 1
    given = config.evaluation.batch_size  # auto is refused there
    prompts = given if in_step and given != "auto" else 1
    more = prompts * SCORED_TOKENS * weights.cached * dtype.itemsize
    more += _scored_adapter(config, zero, machine, weights, dtype, clients)
    spare = work.peak_bytes if work else 0
    if _device(zero, "offload_optimizer") == "none":
        shards = machine.gpus if zero.get("stage", 0) else 1
        spare += _MOMENTS[config.train.optimizer] * weights.trained / shards
    return [Need(name="adapter and KV cache of scoring", gpu=max(0, more - spare))]


def _scored_adapter(
    config: Config,
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    dtype: torch.dtype,
    clients: int,
) -> float:
    """Return the bytes of the scored adapter beyond those of the side adapter in training."""
    if config.aggregate.fold == "planes":
        return 0
    rank, rounds = config.lora.rank, config.federation.rounds
    rank += side_rank_of(config.method, config.aggregate, clients, rank, rounds)
    columns = sum(o + i for o, i in weights.shapes.values())
    more = 4 * rank * columns - dtype.itemsize * weights.side
    return more / (machine.gpus if zero.get("stage", 0) == 3 else 1)


def _files(config: Config, weights: Weights, dtype: torch.dtype, clients: int) -> list[Need]:
    """Return what a run writes; the model's own files are read and not counted."""
    rounds, adapter = config.federation.rounds, 4 * (weights.client + weights.head)
    columns = sum(o + i for o, i in weights.shapes.values())
    update = base_update_rank(config.method, clients, config.lora.rank)
    fold = config.aggregate.fold
    side = update * columns if fold == "side" else 0
    server = adapter + 4 * update * columns + dtype.itemsize * side
    exact = adapter + 4 * rounds * update * columns
    base = weights.base * (4 if fold == "planes" else dtype.itemsize)
    base = base if fold != "side" and update else 0
    # A checkpoint names files that are there, but for a client in the middle of its training.
    return [
        Need(name="client adapters", disk=rounds * clients * adapter),
        Need(name="server's adapters and residuals", disk=rounds * server),
        Need(name="checkpoints", disk=config.run.keep * 12 * weights.trained),
        Need(name="final files", disk=adapter + 2 * exact + base),
    ]


def _step_s(
    config: Config,
    zero: Mapping[str, Any],
    machine: Machine,
    weights: Weights,
    work: Work | None,
    dtype: torch.dtype,
) -> float | None:
    """Return the time of an optimizer step: arithmetic, or bringing weights, whatever is longer."""
    if machine.is_cpu or work is None:
        return None
    train = config.train
    at_once = train.at_once(config.data.max_length)
    micro_batches = math.ceil(train.batch_size / (at_once * machine.gpus))
    compute = work.flops / (machine.tflops * 1e12)
    passes = 3 if config.model.gradient_checkpointing else 2
    moved = passes * weights.base * dtype.itemsize
    speed = {"cpu": LINK_BYTES_S, "nvme": NVME_BYTES_S}.get(_device(zero, "offload_param"))
    # Each rank reads its own shard; a disk is shared by all, a link to the host is each GPU's own.
    if speed == LINK_BYTES_S:
        moved /= machine.gpus
    return micro_batches * max(compute, moved / speed if speed else 0)
