"""The base model and its tokenizer, wrapped once with the adapters that all rounds use."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from fedex_scale.config.learning import ModelSection
from fedex_scale.engine import whole
from fedex_scale.engine.pretrained import bring, reason_of
from fedex_scale.files.basefiles import base_directory
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError
from fedex_scale.tasks.interface import CAUSAL, ModelKind

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "model_configs"
MOST_LAYERS = 2000
MOST_BEAMS = 64
_DIGESTED = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
# Types whose attention was seen to keep examples in one row apart (tests/unit/test_packing.py).
PACKABLE = ("gemma2", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def resolve_dtype(section: ModelSection) -> torch.dtype:
    """Return the dtype that the base is held and computed in."""
    if section.dtype == "auto":
        if torch.cuda.is_available():
            return torch.bfloat16
        features = torch.cpu.get_capabilities()
        if features.get("avx512_bf16") or features.get("amx_bf16"):
            return torch.bfloat16
        log.info("model.dtype: float32, as this CPU has no fast bfloat16")
        return torch.float32
    return getattr(torch, section.dtype)


def load_tokenizer(section: ModelSection, *, writes: bool = True) -> PreTrainedTokenizerBase:
    """Return the tokenizer, with a pad token (eos where it has none).

    Args:
        writes: the model writes text, and so needs an end token.
    """
    if section.config:
        return _byte_tokenizer()
    tokenizer = bring(AutoTokenizer, section)
    padded = not writes and tokenizer.pad_token_id is not None
    if tokenizer.eos_token_id is None and not padded:
        raise UserError(f"model.path: the tokenizer of {section.path} has no EOS token; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def digests(section: ModelSection) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of the files that a model and its tokenizer are made of, by name.

    None of random weights. Some 2 s of a core for a GB, in a thread while the model loads.
    """
    if section.random or section.config:
        return {}
    try:
        folder, found = base_directory(section.path, section.revision), {}
    except UserError:  # loading it says what is wrong, or had it from elsewhere
        return {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix not in _DIGESTED or not path.is_file():
            continue
        found[path.name] = door.digest(path)
    return found


def check_packing(section: ModelSection) -> None:
    """Raise a UserError where examples in one row might see each other."""
    kind = base_config(section).model_type
    if kind not in PACKABLE:
        raise UserError(
            f"train.packing: expected a model of type {', '.join(PACKABLE)}, got {kind}, whose "
            "attention may not keep examples apart; use train.group_by_length instead"
        )


def check_vocabulary(section: ModelSection, largest: int) -> None:
    """Raise a UserError where the tokenizer's largest token is none of the model's."""
    size = base_config(section).get_text_config().vocab_size
    if largest >= size:
        raise UserError(
            f"model: expected tokens below its vocabulary's size, {size}, got token {largest}; "
            f"give {section.path} the tokenizer that it was made with"
        )


def check_lengths(section: ModelSection, longest: int) -> None:
    """Raise a UserError where the longest example has more tokens than the model positions."""
    most = positions(section)
    if most is not None and longest > most:
        raise UserError(
            f"data.max_length: expected examples of at most {most} tokens, the positions of "
            f"{section.path}, got one of {longest}; set data.max_length={most}"
        )


def positions(section: ModelSection) -> int | None:
    """Return the number of tokens that the model can read at once; None where it does not say."""
    config = base_config(section)
    names = ("n_positions", "max_position_embeddings", "n_ctx")  # in lm-eval's order
    told = (getattr(config, x, None) for x in names)
    most = next((number for number in told if number is not None), None)
    if most is not None and config.model_type in ("camembert", "roberta", "xlm-roberta"):
        return most - config.pad_token_id - 1  # where they begin to count
    return most


def load_processor(section: ModelSection, kind: ModelKind) -> Any:
    """Return the model's tokenizer, or what makes its inputs of images."""
    if kind.auto != "AutoModelForImageClassification":
        return load_tokenizer(section, writes=not kind.has_head)
    try:
        return bring(AutoImageProcessor, section)
    except ImportError as error:  # timm's needs torchvision
        reason = " ".join(str(error).split())
        raise UserError(f"model.path: {section.path}: {reason[:200]}") from None


def check_kind(section: ModelSection, kind: ModelKind) -> None:
    """Raise a UserError where no class of this kind, or no such head, is there for the model."""
    config = base_config(section)
    if type(config) not in kind.model_class._model_mapping:
        raise UserError(
            f"model.path: {section.path} is of type {config.model_type}, which has no "
            f"{kind.auto.removeprefix('AutoModel')}; choose another model or another task.kind"
        )
    if kind.head:
        whole.head_modules(meta_model(section, config, kind), kind)


def load_model(
    section: ModelSection, dtype: torch.dtype, device: torch.device, kind: ModelKind = CAUSAL
) -> PreTrainedModel:
    """Return the frozen base model in `dtype`. Under ZeRO-3 it comes partitioned.

    A head that its files do not have, or have for other labels, is drawn from the kind's seed.
    """
    config = base_config(section, kind=kind)
    _check_size(section, config, kind)
    options = {"dtype": dtype, "attn_implementation": attention(section, config), "config": config}
    if device.type != "cpu":  # straight there, and not by way of every rank's host memory
        options["device_map"] = {"": device}
    if section.quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=section.quantization == "int8",
            load_in_4bit=section.quantization == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": device}
    if kind.has_head:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = bring(kind.model_class, section, **options)
        heads = whole.new_modules(model, kind)
        new = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        whole.check_missing(model, heads, new)
        whole.draw(model, new, kind.seed)
    else:
        model = bring(kind.model_class, section, **options)
        model.config.use_cache = True
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # At the first score bitsandbytes would lay 4-bit weights out anew for such a CPU, for
            # good, and no gradient passes through the kernel that reads them so.
            module.support_avx512bf16_for_cpu = False
    check_generation(model, section)
    model.requires_grad_(False)
    return model


def check_generation(model: PreTrainedModel, section: ModelSection) -> None:
    """Raise a UserError for more answers at once than anybody means."""
    settings = getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    at_once = math.prod(getattr(settings, name, None) or 1 for name in names)
    if at_once > MOST_BEAMS:
        raise UserError(
            f"model.path: {section.path}: generation_config.json: expected at most {MOST_BEAMS} "
            f"beams and sequences, got {at_once:,}; correct it"
        )


def _check_size(section: ModelSection, config: PretrainedConfig, kind: ModelKind) -> None:
    """Raise a UserError where config.json tells of far more than a directory's weights hold."""
    if not Path(section.path).is_dir() or is_deepspeed_zero3_enabled():
        return  # transformers would partition the shapes
    found = (x for x in Path(section.path).iterdir() if x.suffix in (".safetensors", ".bin"))
    held = 4 * sum(path.stat().st_size for path in found)  # of two bits at least
    told = sum(weight.numel() for weight in meta_model(section, config, kind).parameters())
    if 0 < held < told:
        raise UserError(
            f"model.path: {section.path}: its config.json tells of {told:,} weights, and its files "
            f"hold at most {held:,}; bring the model anew"
        )


def base_config(
    section: ModelSection, *, offline: bool = False, kind: ModelKind = CAUSAL
) -> PretrainedConfig:
    """Return the model's config.json, with what the kind of task says of its labels.

    Args:
        offline: take the facts that come along for a model of the hub, if there are any, or for
            a directory of that name that is not there yet.

    Raises:
        UserError: it cannot be had, or read.
    """
    config = _plain_config(section, offline=offline)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    if layers > MOST_LAYERS:  # to make them all would take hours
        raise UserError(
            f"model: expected a config.json of at most {MOST_LAYERS:,} layers, got {layers:,}; "
            "bring the model anew"
        )
    for key, value in kind.settings.items():
        if key != "pad_token_id" or getattr(config, key, None) is None:
            setattr(config, key, value)
    return config


def _plain_config(section: ModelSection, *, offline: bool) -> PretrainedConfig:
    file = section.config or (_known(section.path) if offline else None)
    if file is None:
        return bring(AutoConfig, section)
    names = sorted(path.stem for path in CONFIGS.glob("*.json"))
    path = CONFIGS / f"{file}.json" if file in names else Path(file)
    path = path / "config.json" if path.is_dir() else path
    if path.exists():
        door.read_json(path, "correct it", most=2**24)
    else:
        raise UserError(
            f"model.config: expected a config.json or one of {', '.join(names)}, got {file}"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever transformers makes of settings that contradict
        raise UserError(f"model.config: cannot read {path}: {reason_of(error)}") from None


def known_models() -> dict[str, str]:
    """Return the models of the hub whose config.json comes along: its name, by the hub's id."""
    files = sorted(CONFIGS.glob("*.json"))
    return {json.loads(file.read_text())["_name_or_path"]: file.stem for file in files}


def _known(path: str) -> str | None:
    """Return the name of the config that comes along for a model, or None."""
    by_id = known_models()
    by_name = {} if Path(path).exists() else {Path(id).name: by_id[id] for id in by_id}
    return by_id.get(path) or by_name.get(Path(path).name)


def meta_model(
    section: ModelSection, config: PretrainedConfig, kind: ModelKind = CAUSAL
) -> PreTrainedModel:
    """Return the model without memory for its weights: shapes only."""
    with torch.device("meta"):
        return kind.model_class.from_config(config, trust_remote_code=section.trust_remote_code)


def largest_weight(section: ModelSection, kind: ModelKind = CAUSAL) -> int:
    """Return how many elements the model's largest weight has, from its config alone."""
    model = meta_model(section, base_config(section, kind=kind), kind)
    return max(parameter.numel() for parameter in model.parameters())


def attention(section: ModelSection, config: PretrainedConfig) -> str:
    """Return the attention implementation, resolved."""
    if section.attention != "auto":
        return section.attention
    return "eager" if config.model_type == "gemma2" else "sdpa"


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes, and three more."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokens = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
