"""A user's prompts are asked with the tokens that answers follow in training."""

from __future__ import annotations

from pathlib import Path

import chat_templates as published
import pytest
from tiny import SIZES, VOCABULARY, make_metaspace_tokenizer, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fedex_scale.config.learning import DataConfig
from fedex_scale.data.encode import encode
from fedex_scale.data.prompts import schema_of
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring.asked import answers, page, read_prompts, texts_of

ROWS = {
    "alpaca": {"instruction": "How many pens?", "output": "Two"},
    "prompt_completion": {"prompt": "How many pens?", "completion": "Two"},
    "metamath": {"query": "How many pens?", "response": "Two"},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("template", ["auto", "chat"])
@pytest.mark.parametrize("tokenizer", [make_tokenizer(), make_metaspace_tokenizer("first")])
def test_a_prompt_is_asked_as_in_training(name: str, template: str, tokenizer) -> None:
    tokenizer.chat_template = published.MISTRAL
    schema = schema_of(DataConfig(path="x", template=template), name)
    examples = encode([ROWS[name]], schema, tokenizer, max_length=512)
    (text,) = texts_of(["How many pens?"], schema, tokenizer)
    asked = tokenizer(text, add_special_tokens=template == "auto")["input_ids"]
    assert examples[0]["input_ids"][: examples.prompt_lengths[0]] == asked


def test_plain_text_is_asked_as_it_is() -> None:
    tokenizer = make_metaspace_tokenizer("first")
    schema = schema_of(DataConfig(path="x"), "text")
    assert texts_of(["How many"], schema, tokenizer) == ["How many"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "expected 1 to 200 prompts, one a line, .* got 0"),
        (b"a\n" * 201, "got 201"),
        (b"a\ncaf\xe9\n", "line 2: expected UTF-8, got the byte 0xe9"),
        (b"a" * 1_000_001, "expected 1 to 200 prompts"),
        (None, "expected a text file, found none"),
    ],
)
def test_prompts_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(str(file))
    assert len(str(caught.value)) < 400


def test_the_page_shows_text_and_not_what_it_says() -> None:
    shown = page(["<img>"], {"<img>": "a|b\n# c"}, ["\x1b[31m`x`"], 1)
    assert "\x1b" not in shown
    assert "## 1. &lt;img&gt;" in shown
    assert "| a&#124;b<br># c | &#92;x1b&#91;31m&#96;x&#96; |" in shown


def test_prompts_that_were_not_asked_before_say_so() -> None:
    shown = page(["new", "old"], {"old": "one"}, ["two", "three"], 2)
    assert "| not asked | two |" in shown
    assert "| one | three |" in shown


def test_a_short_context_keeps_room_for_the_prompt() -> None:
    """A model of 64 positions can neither write 256 tokens nor be asked to."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": VOCABULARY}))
    tokenizer = make_tokenizer()
    (told,) = answers(model, tokenizer, ["How many pens?"], batch_size=1, as_chat=False)
    assert isinstance(told, str)
