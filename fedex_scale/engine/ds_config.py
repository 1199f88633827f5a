"""DeepSpeed's JSON: which one, and what the run fills in."""

from __future__ import annotations

from typing import Any

import torch

from fedex_scale.config.learning import EngineSection
from fedex_scale.config.shipped import locate, remedy
from fedex_scale.config.words import shown
from fedex_scale.files import checked, kinds
from fedex_scale.runtime import distributed, door
from fedex_scale.runtime.errors import UserError


def read_ds_config(
    section: EngineSection,
    *,
    micro_batch_size: int,
    accumulation: int,
    max_grad_norm: float,
    bf16: bool,
    largest_weight: int,
    quantization: str = "none",
) -> dict[str, Any]:
    """Return the DeepSpeed JSON with its "auto" values filled in.

    Args:
        largest_weight: elements of the model's largest weight; a buffer for NVMe must hold its
            shard.

    Raises:
        UserError: unreadable, or it sets what the run sets (optimizer, scheduler), or asks for a
            ZeRO feature under which a direct write to a shard would go stale.
    """
    config = read_settings(section.deepspeed)
    zero = config.get("zero_optimization", {})
    refused = {
        "optimizer": "optimizer" in config,
        "scheduler": "scheduler" in config,
        "zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) > 1,
        "mics_shard_size": zero.get("mics_shard_size", -1) > 0,
        "zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "zero_quantized_nontrainable_weights": bool(
            zero.get("zero_quantized_nontrainable_weights")
        ),
        "offload_optimizer.device: nvme": (zero.get("offload_optimizer") or {}).get("device")
        == "nvme",
    }
    for key, present in refused.items():
        if present:
            raise UserError(
                f"engine.deepspeed: {section.deepspeed} sets {key}, which does not work with "
                "sequential clients on one engine; remove it"
            )
    if bf16 and not zero.get("stage"):
        raise UserError(
            f"engine.deepspeed: {section.deepspeed} is ZeRO stage 0, whose bfloat16 masters cannot "
            "be reset between clients; use zero2, or none for plain PyTorch"
        )
    if quantization != "none" and zero.get("stage") == 3:
        raise UserError(
            f"model.quantization: expected none under ZeRO-3, got {quantization}, whose packed "
            "weights cannot be sharded; use zero2 or no quantization"
        )
    values = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * distributed.world_size(),
        "gradient_clipping": max_grad_norm,
        "enabled": bf16,
        "pin_memory": torch.cuda.is_available(),
        "nvme_path": section.nvme_path,
        "buffer_size": -(-largest_weight // distributed.world_size()),
    }
    # Its timer waits for the device in every micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return _fill_auto(config, values)


def zero_stage(section: EngineSection) -> int:
    """Return the ZeRO stage that is asked for, 0 without DeepSpeed."""
    return (read_settings(section.deepspeed) or {}).get("zero_optimization", {}).get("stage", 0)


def read_settings(given: str | None) -> dict[str, Any] | None:
    """Return a DeepSpeed file as it stands, or None for plain PyTorch.

    Args:
        given: name of one that comes along, or a path.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if given is None:
        return None
    path = locate("ds_configs", given, "engine.deepspeed")
    try:
        settings = door.read_json(path, "correct it", most=2**20)
    except OSError as error:
        raise UserError(
            f"engine.deepspeed: cannot read {given} ({error.strerror}); "
            f"{remedy('ds_configs', given)}"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(f"engine.deepspeed: {given}: expected an object, got {shown(settings)}")
    what = f"engine.deepspeed: {given}"
    checked.check(kinds.DeepSpeedFile, settings, what, "see ds_configs/README.md")
    return settings


def _fill_auto(node: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    filled = {}
    for key, value in node.items():
        if isinstance(value, dict):
            value = _fill_auto(value, values)
        elif value == "auto":
            if values.get(key) is None:
                remedy = "set engine.nvme_path" if key == "nvme_path" else "give it a value"
                raise UserError(f"engine.deepspeed: nothing to fill {key}: auto with; {remedy}")
            value = values[key]
        filled[key] = value
    return filled
