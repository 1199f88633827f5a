"""Chats: the assistant's tokens, and no others, are trained, whatever the template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path

import chat_templates as published
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedex_scale.config.learning import DataConfig
from fedex_scale.data.chat import ChatEncoder, render, template_of
from fedex_scale.data.encode import encode
from fedex_scale.data.prompts import Schema, schema_of
from fedex_scale.runtime.errors import UserError

SMOLLM2 = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct"
CHAT = Schema(None, "", turns="messages", as_chat=True)
NUM_CHATS = 200


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    match name:
        case "smollm2":
            return AutoTokenizer.from_pretrained(SMOLLM2)
        case "smollm2_small":
            return published.byte_level(["<|im_start|>", "<|im_end|>"])
        case "llama32":
            return published.byte_level(published.SPECIAL["llama"])
        case "gemma2":
            return published.metaspace(published.SPECIAL["gemma"], "never")
        case "mistral":
            return published.metaspace(published.SPECIAL["mistral"], "first")
    raise AssertionError(name)


CASES = {
    "smollm2": (published.SMOLLM2, published.smollm2),
    "smollm2_small": (published.SMOLLM2, published.smollm2),
    "llama32": (published.LLAMA32, published.llama32),
    "gemma2": (published.GEMMA2, published.gemma2),
    "mistral": (published.MISTRAL, published.mistral),
}


def by_hand(
    segments: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Return tokens and mask by tokenizing all that stands before each begin and end anew."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ends = list(accumulate(len(text) for text, _ in segments))
    text = "".join(text for text, _ in segments)
    spans = [
        (end - len(part), end)
        for end, (part, trained) in zip(ends, segments, strict=True)
        if trained
    ]
    ids = tokens(text)
    if all(ids[: len(tokens(text[:begin]))] == tokens(text[:begin]) for begin, _ in spans):
        mask = [False] * len(ids)
        for begin, end in spans:
            for i in range(len(tokens(text[:begin])), len(tokens(text[:end]))):
                mask[i] = True
        return ids, mask
    ids, mask = [], []
    for begin, end in pairwise([0, *(begin for begin, _ in spans), len(text)]):
        piece = tokens(text[begin:end])
        stop = next((stop for start, stop in spans if start == begin), begin)
        trained = len(tokens(text[begin:stop]))
        ids += piece
        mask += [True] * trained + [False] * (len(piece) - trained)
    return ids, mask


@pytest.mark.parametrize("name", CASES)
def test_the_masks_are_those_made_by_hand_from_the_templates_text(name: str) -> None:
    if name == "smollm2" and not SMOLLM2.is_dir():
        pytest.skip("its tokenizer is not here")
    tokenizer, (template, segments_of) = tokenizer_of(name), CASES[name]
    chats, draw = ChatEncoder(template, tokenizer), random.Random(name)
    trained = 0
    for _ in range(NUM_CHATS):
        turns = published.conversation(draw, system=name in ("smollm2", "llama32"))
        segments = segments_of(turns)
        assert render(turns, template, tokenizer, ask=False) == "".join(x for x, _ in segments)
        expected = by_hand(segments, tokenizer)
        assert chats.encode(turns) == expected, turns
        trained += sum(expected[1])
    assert trained > 10 * NUM_CHATS


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_of("smollm2_small")
    tokenizer.chat_template = published.SMOLLM2
    return tokenizer


def trained_text(rows: list[dict], tokenizer: PreTrainedTokenizerBase, schema: Schema) -> list[str]:
    """Return what is trained of each row, as text."""
    examples = encode(rows, schema, tokenizer, max_length=512)
    labels = [examples[i]["labels"] for i in range(len(examples))]
    assert examples.num_trained.tolist() == [sum(x != -100 for x in row) for row in labels]
    return [tokenizer.decode([label for label in row if label != -100]) for row in labels]


def test_each_form_of_a_chat(small: PreTrainedTokenizerBase):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    openai = {"messages": [user("a mat"), assistant(parts), user("sat"), assistant("12")]}
    sharegpt = {
        "system": "the mat",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "the cat"},
            {"from": "human", "value": "sat"},
            {"from": "gpt", "value": "12"},
        ],
    }
    expected = ["the cat<|im_end|>12<|im_end|>"]
    assert trained_text([openai], small, CHAT) == expected
    turns = Schema(None, "", turns="conversations", as_chat=True)
    assert trained_text([sharegpt], small, turns) == expected
    text = small.decode(encode([sharegpt], turns, small, max_length=512)[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nthe mat<|im_end|>")


def test_a_system_column_is_the_first_turn(small: PreTrainedTokenizerBase):
    rows = [{"system": text, "messages": [user("a"), assistant("12")]} for text in ("the mat", "")]
    own = [{"role": "system", "content": "the mat"}, user("a"), assistant("12")]
    rows.append({"system": "the mat", "messages": own})
    with_it, without, both = encode(rows, CHAT, small, max_length=512)
    assert small.decode(with_it["input_ids"]).startswith("<|im_start|>system\nthe mat<|im_end|>")
    assert with_it["input_ids"] == both["input_ids"] != without["input_ids"]
    parts = {"system": [{"type": "text", "text": "the mat"}], "messages": own[1:]}
    assert encode([parts], CHAT, small, max_length=512)[0]["input_ids"] == both["input_ids"]
    for odd in (5, ["the mat"], {"role": "system", "content": "the mat"}):
        with pytest.raises(UserError, match="system: expected text, got"):
            encode([{"system": odd, "messages": own[1:]}], CHAT, small, max_length=512)
    with pytest.raises(UserError, match="system: expected the same text as in the system turn of"):
        encode([{"system": "a cat", "messages": own}], CHAT, small, max_length=512)


def test_an_instruction_can_go_through_the_chat_template(small: PreTrainedTokenizerBase):
    schema = schema_of(DataConfig(path="x", template="chat"), "alpaca")
    row = {"instruction": "the cat", "input": "a mat", "output": "sat"}
    assert trained_text([row], small, schema) == ["sat<|im_end|>"]
    example = encode([row], schema, small, max_length=512)[0]
    assert "user\nthe cat\n\na mat<|im_end|>" in small.decode(example["input_ids"])


def test_a_chat_that_is_cut_keeps_the_turns_that_fit(small: PreTrainedTokenizerBase):
    row = {"messages": [user("a"), assistant("the cat"), user("b"), assistant("sat " * 50)]}
    whole = encode([row], CHAT, small, max_length=512)
    first = whole[0]["labels"].index(small.eos_token_id)
    cut = encode([row], CHAT, small, max_length=first + 2)
    assert (cut.num_truncated, cut.num_dropped, cut.longest) == (1, 0, whole.lengths[0])
    assert cut.num_trained[0] == sum(label != -100 for label in whole[0]["labels"][: first + 2])
    with pytest.raises(UserError, match="which no row fits"):
        encode([row], CHAT, small, max_length=5)


def test_a_template_without_an_end_token_gets_one(small: PreTrainedTokenizerBase):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokens, trained = ChatEncoder(plain, small).encode([user("a"), assistant("sat")])
    assert small.decode([t for t, own in zip(tokens, trained, strict=True) if own]) == (
        "sat<|im_end|>"
    )


def trained_of(chats: ChatEncoder, turns: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what is trained, and a bar for each run of other tokens."""
    pieces = groupby(zip(*chats.encode(turns), strict=True), key=lambda pair: pair[1])
    return "".join(tokenizer.decode([t for t, _ in run]) if own else "|" for own, run in pieces)


@pytest.mark.parametrize("ends_as", ["text", "token"])
def test_the_end_that_a_template_writes_is_trained_whatever_its_tokens(ends_as: str):
    base = published.byte_level(["<bos>", "<eos>"])
    if ends_as == "token":
        base.add_tokens([AddedToken("<|im_end|>", special=False)])
    turns = [user("the cat"), assistant("sat"), user("a mat"), assistant("12")]
    eos = "<eos>" if ends_as == "text" else "|"  # no token ends it, so that a server would go on
    chatml = template_of("chatml", base)
    trained = trained_of(ChatEncoder(chatml, base), turns, base)
    assert trained == f"|sat<|im_end|>|12<|im_end|>{eos}"
    last = "{% if not add_generation_prompt %}<|end of chat|>{% endif %}"
    trained = trained_of(ChatEncoder(chatml + last, base), turns, base)
    assert trained.startswith("|sat<|im_end|>|12<|im_end|>")


def test_an_end_follows_only_an_answer_that_is_trained(small: PreTrainedTokenizerBase):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chats = ChatEncoder(plain + "{% if add_generation_prompt %}assistant: {% endif %}", small)
    turns = [user("a"), assistant("sat"), user("the cat"), assistant("12")]
    assert trained_of(chats, turns, small) == "|sat|12<|im_end|>"
    turns[3]["weight"] = 0
    assert trained_of(chats, turns, small) == "|sat|"


def test_a_token_over_the_begin_of_an_answer_changes_none_before():
    """Up to there a server's tokens of the prompt are the tokens that are trained."""
    tokenizer = tokenizer_of("mistral")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    turns = [user("the cat"), assistant("日本"), user("a mat"), assistant("sat")]
    tokens, _ = ChatEncoder(template, tokenizer).encode(turns)
    for asked in (turns[:1], turns[:3]):
        text = render(asked, template, tokenizer, ask=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens[: len(prompt)] == prompt


def test_the_users_last_word_is_not_trained(small: PreTrainedTokenizerBase):
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    turns = [user("a"), assistant("sat"), user("the cat")]
    tokens, trained = ChatEncoder(plain, small).encode(turns)
    assert small.decode([t for t, own in zip(tokens, trained, strict=True) if own]) == "sat"


def test_an_answer_of_weight_0_is_not_trained(small: PreTrainedTokenizerBase):
    turns = [user("a"), {**assistant("sat"), "weight": 0}, user("b"), assistant("12")]
    assert trained_text([{"messages": turns}], small, CHAT) == ["12<|im_end|>"]
    none = {"messages": turns[:2]}
    with pytest.raises(
        UserError, match="row 1: expected an answer to train on, got ones of weight"
    ):
        encode([none], CHAT, small, max_length=512)


def test_templates_that_come_along_suit_a_model_without_one(small: PreTrainedTokenizerBase):
    base = tokenizer_of("mistral")
    for name in ("chatml", "zephyr"):
        tokens, trained = ChatEncoder(template_of(name, base), base).encode(
            [user("the cat"), assistant("sat")]
        )
        own = base.decode([t for t, here in zip(tokens, trained, strict=True) if here])
        assert own.startswith("sat")
        assert own.endswith("</s>")
    with pytest.raises(UserError, match=r"has none; set data.chat_template to chatml or zephyr"):
        template_of(None, base)
    with pytest.raises(UserError, match=r"got nowhere.jinja \(No such file"):
        template_of("nowhere.jinja", base)


def test_the_date_in_a_template_is_always_the_same(small: PreTrainedTokenizerBase):
    template = "{{ strftime_now('%B %d, %Y') }}" + published.SMOLLM2
    turns = [user("a"), assistant("b")]
    assert render(turns, template, small, ask=False).startswith("July 26, 2024<|im_start|>")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([user("a")], "expected a turn of the assistant, got none"),
        ([assistant("a"), user("b")], "turn 1: expected user"),
        ([user("a"), assistant("b"), assistant("c")], "turn 3: expected user"),
        ([user("a"), user("b")], "turn 2: expected assistant"),
        ([user(" "), assistant("b")], "turn 1: expected text in content, got an empty turn"),
        ([user("a"), assistant(None)], "turn 2: expected text in content, got an empty turn"),
        ([user("a"), assistant([{"type": "image"}])], "turn 2: expected .* of the type image, "),
        ([user("a"), {"role": "critic", "content": "b"}], "turn 2: expected role to be one of"),
        ([user("a"), "b"], "turn 2: expected role .* got 'b'"),
        ([5], "turn 1: expected role .* got 5"),
        ([], r"expected a list of turns in messages, got \[\]"),
        ("hello", "expected a list of turns in messages, got 'hello'"),
    ],
)
def test_turns_that_are_no_chat(turns: object, message: str, small: PreTrainedTokenizerBase):
    with pytest.raises(UserError, match=f"row 2: {message}"):
        encode(
            [{"messages": [user("a"), assistant("b")]}, {"messages": turns}],
            CHAT,
            small,
            max_length=512,
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content|upper }}{% endfor %}", "does not show turn 2"),
        ("{{ messages[0].content }}", "does not show turn 2"),
        ("{{ raise_exception('No system') }}", "refuses the turns .*No system"),
        ("{% for m in messages %}", "refuses the turns"),
        ("{{ messages.__class__.__mro__ }}", "refuses the turns .*Security"),
        ("{{ messages[0].content.nothing.at_all }}", "refuses the turns"),
    ],
)
def test_templates_that_do_not_mark_the_assistant(
    template: str, message: str, small: PreTrainedTokenizerBase
):
    with pytest.raises(UserError, match=message) as caught:
        ChatEncoder(template, small).encode([user("a"), assistant("b")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_turn_that_the_template_leaves_out_is_refused(role: str, small: PreTrainedTokenizerBase):
    small.chat_template = (
        "{% for m in messages %}{% if m.role != '" + role + "' %}[{{ m.role }}]{{ m.content }}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": "system", "content": "the mat"}, user("a cat"), assistant("12")]
    with pytest.raises(UserError, match=f"does not show turn ., the {role}'s"):
        encode([{"messages": turns}], CHAT, small, max_length=512)
