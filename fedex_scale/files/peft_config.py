"""adapter_config.json as PEFT writes it: read, and refused where it is more than plain LoRA."""

from __future__ import annotations

from pathlib import Path

from fedex_scale.files import checked, kinds
from fedex_scale.files.patterns import Matcher
from fedex_scale.runtime import door
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
_TASKS = ("CAUSAL_LM SEQ_CLS SEQ_2_SEQ_LM TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION").split()


def read_config(path: Path) -> dict:
    """Return the settings of an adapter directory, or raise a UserError that names it."""
    file, remedy = path / CONFIG_FILE, "save the adapter again"
    try:
        config = door.read_json(file, remedy, most=_MAX_BYTES, inside=path)
    except OSError:
        raise UserError(
            f"{path}: expected a PEFT adapter directory, found no {CONFIG_FILE}"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != "LORA":
        raise UserError(f"{file}: peft_type: expected LORA, got {kind!r:.80}; train one with LoRA")
    known = checked.check(kinds.AdapterConfig, config, file, remedy)
    task = known.task_type
    if task is not None and task not in _TASKS:
        raise UserError(
            f"{file}: task_type: expected null or one of {', '.join(_TASKS)}, got {task!r:.80}; "
            "correct it"
        )
    refused = {key: config.get(key) for key in _REFUSED if config.get(key)}
    if config.get("bias") not in (None, "none"):
        refused["bias"] = config["bias"]
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        refused["init_lora_weights"] = config["init_lora_weights"]
    if refused:
        key, value = next(iter(refused.items()))
        raise UserError(
            f"{file}: {key}: expected plain LoRA, got {value!r:.80}, which cannot be aggregated; "
            "train without it"
        )
    matcher = Matcher(file)
    matcher.check([*(known.rank_pattern or ()), *(known.alpha_pattern or ())])
    matcher.check([x for x in (known.target_modules, known.exclude_modules) if isinstance(x, str)])
    return config
