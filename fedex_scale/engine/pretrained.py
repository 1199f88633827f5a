"""What transformers loads, from a directory or the hub, or one line on why it cannot be had."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from fedex_scale.config.learning import ModelSection
from fedex_scale.config.places import check_model
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError


def bring(cls: type, section: ModelSection, **options: Any) -> Any:
    """Call `cls.from_pretrained`; a model that cannot be had is the user's to put right."""
    check_model(section)
    _check_hub(section.path, section.revision)
    path = Path(section.path)
    if path.exists():
        door.check_directory(path)
        door.read_json(path / "config.json", "fetch the model again", most=2**24)
    try:
        return cls.from_pretrained(
            section.path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            **options,
        )
    except SafetensorError as error:
        raise UserError(
            f"model.path: {section.path}: its weights are damaged ({error}); bring them anew"
        ) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers makes of settings that contradict
        if cls is AutoTokenizer and "backend tokenizer" in str(error):
            reason = "no tokenizer.json is there; copy the tokenizer's files to the model's"
        else:
            reason = reason_of(error)
        if section.attention != "auto" and "attention" in reason.lower():
            reason += f"; install what it lacks, or leave out model.attention={section.attention}"
        raise UserError(f"model.path: cannot load {section.path}: {reason}") from None


def reason_of(error: Exception) -> str:
    """Return an error's words, and its kind where that tells more than they do."""
    words = " ".join(str(error).split())[:300] or "no reason given"
    own = isinstance(error, (OSError, ValueError, ImportError))
    return words if own else f"{type(error).__name__}: {words}"


@cache
def _check_hub(path: str, revision: str | None) -> None:
    """Raise a UserError where a model is to come from the hub, which does not have it or answer.

    One question: to load would ask for one file after another, each for a while.
    """
    if Path(path).exists() or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return
    try:
        HfApi().model_info(path, revision=revision, timeout=10)
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "an error"
        raise UserError(
            f"model.path: the hub answers {code} for {path}; correct the name, or for a private or "
            "gated model log in (hf auth login)"
        ) from None
    except Exception as error:  # of the network, in the words of whatever sends
        raise UserError(
            f"model.path: {path} is neither a directory nor in the hub's cache, and the hub does "
            f"not answer ({error!s:.150}); correct the path, or the network"
        ) from None
