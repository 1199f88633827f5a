"""Chats in which functions are called: what the template knows is trained, the rest is refused."""

from __future__ import annotations

import json

import chat_templates as published
import pytest
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.learning import DataConfig
from fedex_scale.data.chat import template_of
from fedex_scale.data.encode import encode
from fedex_scale.data.prompts import Schema
from fedex_scale.data.sources import load_pool
from fedex_scale.data.textfiles import read_whole
from fedex_scale.runtime.errors import UserError

CHAT = Schema(None, "", turns="messages", as_chat=True, chat_template="chatml")
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {}, "b": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
LLAMA31 = (  # as published, cut to what tells tools; it knows one call a turn, and no text by it
    "{{ bos_token }}{% for message in messages %}{% if 'tool_calls' in message %}"
    "{% if message.tool_calls|length != 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{\"name\": \"' + call.name + '\", ' }}"
    "{{ '\"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{ message.content | tojson }}{{ '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object, *calls: tuple[str, object]) -> dict:
    named = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": named} if calls else {})


def tool(content: object) -> dict:
    return {"role": "tool", "tool_call_id": "c00000001", "content": content}


def chat(arguments: object = '{"city": "Rome"}') -> list[dict]:
    called = assistant(None, ("weather", arguments))
    return [user("the cat"), called, tool('{"t": "20"}'), assistant("sat")]


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerBase:
    return published.byte_level(["<|im_start|>", "<|im_end|>", *published.SPECIAL["llama"]])


def trained(row: dict, tokenizer: PreTrainedTokenizerBase, schema: Schema = CHAT) -> list[str]:
    """Return the pieces of a row's text that are trained."""
    example = encode([row], schema, tokenizer, max_length=4096)[0]
    pieces, before = [], -1
    for at, label in enumerate(example["labels"]):
        if label != -100:
            pieces.extend([[]] * (at != before + 1))
            pieces[-1] = [*pieces[-1], label]
            before = at
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', {"city": "Rome"}])
def test_calls_are_trained_and_what_tools_give_is_not(
    arguments: object, small: PreTrainedTokenizerBase
) -> None:
    row = {"messages": chat(arguments), "tools": [{"type": "function", "function": WEATHER}]}
    assert trained(row, small) == [CALL, "sat<|im_end|>"]
    text = small.decode(encode([row], CHAT, small, max_length=4096)[0]["input_ids"])
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert 'user\n<tool_response>\n{"t": "20"}\n</tool_response><|im_end|>' in text


def test_sharegpts_form_means_the_same(small: PreTrainedTokenizerBase) -> None:
    called = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    told = [("human", "the cat"), ("function_call", called), ("observation", "20"), ("gpt", "sat")]
    row = {"conversations": [{"from": who, "value": said} for who, said in told]}
    row["tools"] = json.dumps([WEATHER])
    schema = Schema(None, "", turns="conversations", as_chat=True, chat_template="chatml")
    assert trained(row, small, schema) == [CALL, "sat<|im_end|>"]


def test_two_calls_at_once_and_a_call_at_the_end(small: PreTrainedTokenizerBase) -> None:
    both = assistant("so ", ("weather", {}), ("add", {"a": 1}))
    turns = [user("a"), both, tool("1"), tool("2"), assistant("b", ("add", "{}"))]
    first, last = trained({"messages": turns}, small)
    assert first.startswith("so \n<tool_call>")
    assert first.count("</tool_call>") == 2
    assert last.startswith("b\n<tool_call>")
    assert last.endswith("</tool_call><|im_end|>")


def test_a_template_of_another_family(small: PreTrainedTokenizerBase, tmp_path) -> None:
    (tmp_path / "llama.jinja").write_text(LLAMA31)
    schema = Schema(
        None, "", turns="messages", as_chat=True, chat_template=str(tmp_path / "llama.jinja")
    )
    call = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
    assert trained({"messages": chat()}, small, schema) == [call, "sat<|eot_id|>"]
    with pytest.raises(UserError, match="row 1: the chat template does not show the row's tools; "):
        trained({"messages": chat(), "tools": [WEATHER]}, small, schema)
    beside = [user("a"), assistant("so", ("add", {}))]
    with pytest.raises(UserError, match="row 1: the chat template does not show turn 2 "):
        trained({"messages": beside}, small, schema)
    twice = [user("a"), assistant("", ("add", {}), ("add", {}))]
    with pytest.raises(UserError, match=r"refuses the turns \(TemplateError: one call at once\)"):
        trained({"messages": twice}, small, schema)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            published.SMOLLM2,
            chat()[:2],
            "does not show turn 2, a tool call; set data.chat_template",
        ),
        (published.LLAMA32, [chat()[0], chat()[1], *chat()[2:]], "does not show turn 2, a tool"),
        ("{{ 1 / 0 }}", [user("a"), assistant("b")], "refuses the turns (ZeroDivisionError: divi"),
        (None, [user("a"), tool("b")], "turn 2: expected assistant, as user and assistant take"),
        (None, [*chat()[:2], user("b")], "turn 3: expected tool, as it was called, got user"),
        (None, [*chat()[:2], assistant("b")], "turn 3: expected tool, as it was called, got assi"),
        (None, chat("{city"), "turn 2: tool_calls: arguments of weather: expected JSON, got '{ci"),
        (
            None,
            chat("[1]"),
            r"turn 2: tool_calls: expected the arguments of weather by their names",
        ),
        (None, chat("[" * 100_000), "turn 2: tool_calls: arguments of weather: expected JSON, got"),
        (None, [user("a"), assistant("", ("", {}))], "turn 2: tool_calls: expected a function's n"),
        (None, [user("a") | {"tool_calls": [WEATHER]}], "turn 1: tool_calls: expected them in a t"),
        (None, [user("a"), assistant("") | {"tool_calls": 5}], "turn 2: tool_calls: expected a li"),
        (None, [user("a"), assistant("b") | {"function_call": {}}], "turn 2: function_call is out"),
    ],
)
def test_what_cannot_be_told_is_refused_by_its_turn(
    template: str | None, turns: list, message: str, small: PreTrainedTokenizerBase, tmp_path
) -> None:
    (tmp_path / "own.jinja").write_text(template or template_of("chatml", small))
    schema = Schema(
        None, "", turns="messages", as_chat=True, chat_template=str(tmp_path / "own.jinja")
    )
    with pytest.raises(UserError) as told:
        trained({"messages": turns}, small, schema)
    assert message in str(told.value)
    assert str(told.value).startswith("row 1: ")


@pytest.mark.parametrize("tools", [5, ["weather"], [{"name": 5}], "weather", [{"function": "x"}]])
def test_tools_that_are_none_are_refused(tools: object, small: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="row 1: tools: expected "):
        trained({"messages": chat(), "tools": tools}, small)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("parts", [False, True])
def test_each_row_of_a_file_keeps_its_own_tools(
    parts: bool, suffix: str, small: PreTrainedTokenizerBase, tmp_path
) -> None:
    """A table gives all rows the same keys."""
    text = [{"type": "text", "text": "a"}]
    added = [user(text if parts else "a"), assistant(None, ("add", {"a": 1, "b": [2]})), tool("3")]
    rows = [
        {"messages": chat({"city": "Rome"}), "tools": [WEATHER]},
        {"messages": added, "tools": [ADD]},
        {"messages": [user("a"), assistant("b")]},
    ]
    path = tmp_path / f"rows{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if suffix == ".jsonl" else json.dumps(rows))
    reads = [load_pool(DataConfig(path=str(path)), seed=0).rows]
    if suffix == ".jsonl":
        reads.append(read_whole([str(path)]))  # where `datasets` gives up
    for read in reads:
        for row, expected in zip(read, rows, strict=True):
            one, other = (encode([each], CHAT, small, max_length=4096) for each in (row, expected))
            assert one[0] == other[0]
