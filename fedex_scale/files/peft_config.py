"""adapter_config.json as PEFT writes it: read, and refused where it is more than plain LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedex_scale.runtime.errors import UserError

CONFIG_FILE = "adapter_config.json"
# PEFT's settings under which a layer is no longer W + s B A, or a weight is more than its tensors.
_REFUSED = (
    "use_dora lora_bias layer_replication target_parameters trainable_token_indices use_qalora "
    "use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config"
).split()
_MAX_BYTES = 2**20
# Initial values for which PEFT changes the base weights as it loads an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(path: Path) -> dict:
    """Return the settings of an adapter directory, or raise a UserError that names it."""
    file = path / CONFIG_FILE
    try:
        if file.exists() and (not file.is_file() or file.stat().st_size > _MAX_BYTES):
            raise ValueError(f"not a file of at most {_MAX_BYTES} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path}: expected a PEFT adapter directory, found no {CONFIG_FILE}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: expected a LoRA adapter, got {config!r:.80}")
    _check_numbers(config, file)
    task = config.get("task_type")
    if task is not None and not (isinstance(task, str) and task.isidentifier()):
        raise UserError(f"{file}: task_type: expected a name or null, got {task!r:.80}")
    refused = {key: config.get(key) for key in _REFUSED if config.get(key)}
    if config.get("bias") not in (None, "none"):
        refused["bias"] = config["bias"]
    if str(config.get("init_lora_weights")).startswith(_CHANGES_BASE):
        refused["init_lora_weights"] = config["init_lora_weights"]
    if refused:
        key, value = next(iter(refused.items()))
        raise UserError(
            f"{file}: {key}: expected plain LoRA, got {value!r:.80}, which cannot be aggregated; "
            "train without it"
        )
    return config


def _check_numbers(config: dict, file: Path) -> None:
    patterns = [config.get(f"{name}_pattern") or {} for name in ("rank", "alpha")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise UserError(f"{file}: expected rank_pattern and alpha_pattern by layer, got {patterns}")
    for key in (key for pattern in patterns for key in pattern):
        if not _is_simple(key):
            raise UserError(
                f"{file}: expected the names of layers in rank_pattern and alpha_pattern, got "
                f"{key!r:.80}; name each layer"
            )
    for rank in (config.get("r"), *patterns[0].values()):
        for alpha in (config.get("lora_alpha"), *patterns[1].values()):
            positive = isinstance(alpha, (int, float)) and 0 < alpha < 1e30
            if type(rank) is not int or not 0 < rank < 2**31 or not positive:
                raise UserError(
                    f"{file}: expected r >= 1 and a positive lora_alpha, got {rank}, {alpha}"
                )


def _is_simple(pattern: str) -> bool:
    """Return whether a regular expression from someone else is valid and soon matched.

    Repetitions of repetitions, or many of them, could take for ever.
    """
    repetitions = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > 500 or repetitions > 2 or re.search(r"\)[*+?{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
