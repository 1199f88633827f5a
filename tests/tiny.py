"""Tiny random models with a tokenizer of their own, and adapters: made on disk, without a hub.

Real architectures, so that whatever reads a checkpoint reads these. No weight is square where the
architecture allows it (GPT-2's attention output is), and ranks are smaller than either side.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fedex_scale.methods.algebra import Pair

VOCABULARY = 400
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Of a model of any type, in the words that their configs share.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SENTENCES = [
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction: Tom has 12 apples and buys 7 more. How many apples does he have now?",
    "### Response: Tom has 12 + 7 = 19 apples. The answer is: 19",
    "A box holds 6 pens. How many pens are in 4 boxes? 6 * 4 = 24. The answer is: 24",
    "Mia had 35 coins and spent 8 of them. 35 - 8 = 27 coins are left. The answer is: 27",
    "Is the sky blue on a clear day? the correct answer is true",
]


def make_llama(
    directory: Path,
    *,
    width: int = 48,
    inner: int = 112,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    shard_size: str = "150KB",
) -> Path:
    """Write a 2-layer Llama, in several safetensors files with an index, and its tokenizer."""
    config = LlamaConfig(
        **_tokens(),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    return _save(LlamaForCausalLM, config, directory, max_shard_size=shard_size)


def make_gpt2(directory: Path) -> Path:
    """Write a 2-layer GPT-2, whose layers are Conv1D and whose head is its embedding."""
    config = GPT2Config(
        **_tokens(),
        n_embd=48,
        n_inner=112,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _save(GPT2LMHeadModel, config, directory)


def make_roberta(directory: Path) -> Path:
    """Write a 2-layer RoBERTa without a head, as hubs have it, and its tokenizer."""
    config = RobertaConfig(
        **_tokens(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _save(RobertaForMaskedLM, config, directory)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the few sentences above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def make_metaspace_tokenizer(prepend: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks spaces as SentencePiece's do, with words of a few letters.

    Args:
        prepend: whether a text begins with a space of its own: `always` or `first` as in Llama-2
            and Mistral, `never` as in Gemma.
    """
    tokenizer = Tokenizer(models.BPE())
    mark = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([mark, pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def random_pairs(
    shapes: Mapping[str, tuple[int, int]], *, rank: int, seed: int, size: float = 1.0
) -> dict[str, Pair]:
    """Return Gaussian A (R, I) and B (O, R) of each layer, times `size`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: Pair(
            size * torch.randn(rank, num_in, generator=draw),
            size * torch.randn(num_out, rank, generator=draw),
        )
        for layer, (num_out, num_in) in shapes.items()
    }


def near(pairs: Mapping[str, Pair], *, spread: float, seed: int) -> dict[str, Pair]:
    """Return pairs that differ from the given ones by Gaussian noise of size `spread`."""
    shapes = {layer: (B_OR.shape[0], A_RI.shape[1]) for layer, (A_RI, B_OR) in pairs.items()}
    rank = next(iter(pairs.values())).A_RI.shape[0]
    noise = random_pairs(shapes, rank=rank, seed=seed, size=spread)
    return {
        layer: Pair(*(x + dx for x, dx in zip(pair, noise[layer], strict=True)))
        for layer, pair in pairs.items()
    }


def save_adapter(
    directory: Path,
    pairs: Mapping[str, Pair],
    *,
    alpha: float,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Write a PEFT LoRA directory by the safetensors library alone.

    Args:
        config: what adapter_config.json is to hold besides, or instead.
    """
    directory.mkdir(parents=True)
    tensors = {}
    for layer, pair in pairs.items():
        for name, factor in zip("AB", pair, strict=True):
            key = f"base_model.model.{layer}.lora_{name}.weight"
            tensors[key] = factor.to(dtype).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": next(iter(pairs.values())).A_RI.shape[0],
        "lora_alpha": alpha,
        "target_modules": sorted({layer.rsplit(".", 1)[-1] for layer in pairs}),
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def logits(model: torch.nn.Module, texts: Sequence[str] = SENTENCES[2:4]) -> torch.Tensor:
    """Return a model's logits, float32, one text after another."""
    tokenizer = make_tokenizer()
    model.eval()
    with torch.no_grad():
        rows = [
            model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].float()
            for text in texts
        ]
    return torch.cat(rows)


def _tokens() -> dict[str, int]:
    return {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _save(
    cls: type[PreTrainedModel], config: PretrainedConfig, directory: Path, **options: object
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
    model.save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    return directory
