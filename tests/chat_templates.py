"""Chat templates as models publish them, and the text that each is to give, written by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA32 = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""  # noqa: E501
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant "
    "roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<s>", "</s>"],
}
Segments = list[tuple[str, bool]]
Turns = Sequence[dict[str, str]]
WORDS = (
    "the cat sat on a mat 12 + 7 = 19 , . ! ? naïve 日本語 🙂 straße <b> {x} # -- '' \n \n\n \t"
).split(" ")


def smollm2(turns: Turns) -> Segments:
    first = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    parts: Segments = []
    if turns[0]["role"] != "system":
        parts.append((f"<|im_start|>system\n{first}<|im_end|>\n", False))
    for turn in turns:
        parts.append((f"<|im_start|>{turn['role']}\n", False))
        parts.append((f"{turn['content']}<|im_end|>", turn["role"] == "assistant"))
        parts.append(("\n", False))
    return parts


def llama32(turns: Turns) -> Segments:
    system = turns[0]["content"].strip() if turns[0]["role"] == "system" else ""
    parts: Segments = [
        ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False),
        ("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", False),
        (f"{system}<|eot_id|>", False),
    ]
    for turn in turns[turns[0]["role"] == "system" :]:
        parts.append((f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False))
        parts.append((f"{turn['content'].strip()}<|eot_id|>", turn["role"] == "assistant"))
    return parts


def gemma2(turns: Turns) -> Segments:
    parts: Segments = [("<bos>", False)]
    for turn in turns:
        role = "model" if turn["role"] == "assistant" else "user"
        parts.append((f"<start_of_turn>{role}\n", False))
        parts.append((f"{turn['content'].strip()}<end_of_turn>", role == "model"))
        parts.append(("\n", False))
    return parts


def mistral(turns: Turns) -> Segments:
    parts: Segments = [("<s>", False)]
    for turn in turns:
        if turn["role"] == "user":
            parts.append((f"[INST] {turn['content']} [/INST]", False))
        else:
            parts.append((f"{turn['content']}</s>", True))
    return parts


def conversation(draw: random.Random, *, system: bool) -> list[dict[str, str]]:
    """Return turns of words, signs and white space, which may also begin and end them."""
    turns = [{"role": "system", "content": words(draw)}] if system and draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 4)):
        turns.append({"role": "user", "content": words(draw)})
        turns.append({"role": "assistant", "content": words(draw)})
    return turns


def words(draw: random.Random) -> str:
    text = draw.choice(["", " "]).join(draw.choices(WORDS, k=draw.randint(1, 12)))
    return text if text.strip() else words(draw)


def byte_level(special: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama-3 has, whose offsets leave out a word's space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _finished(tokenizer, trainer, special, processors.ByteLevel(trim_offsets=True))


def metaspace(special: Sequence[str], prepend: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks spaces as SentencePiece's do, as Mistral and Gemma have."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    return _finished(tokenizer, trainer, special, None)


def _finished(
    tokenizer: Tokenizer,
    trainer: trainers.BpeTrainer,
    special: Sequence[str],
    processor: processors.PostProcessor | None,
) -> PreTrainedTokenizerFast:
    draw = random.Random(0)
    texts = [words(draw) for _ in range(300)] + ["[INST] the cat [/INST]", "user\n assistant\n\n"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    if processor is not None:
        tokenizer.post_processor = processor
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1]
    )
