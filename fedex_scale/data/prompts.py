"""What a row is: the schemas that there are, which one the columns mean, and the prompts around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedex_scale.config.learning import DataConfig
from fedex_scale.config.words import named, shown
from fedex_scale.data.answers import ANSWER_MARKER, gold_number
from fedex_scale.runtime.errors import UserError

_BELOW = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request.\n\n"
_TASK = f"{_BELOW}. {_WRITE}### Instruction:\n{{instruction}}\n\n"
MATH_PROMPT = _TASK + "### Response:"
"""Training on MetaMathQA; the response follows without a space. Source: arXiv:2309.12284. The same
as Alpaca's for a row without an input."""
MATH_EVALUATION_PROMPT = MATH_PROMPT + " Let's think step by step."
COMMONSENSE_PROMPT = _TASK + "### Response:\n"
"""Training and evaluation on Commonsense170K. Source: LLM-Adapters, arXiv:2304.01933."""
INPUT_PROMPT = (
    f"{_BELOW}, paired with an input that provides further context. {_WRITE}"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:"
)
"""Of a row with an input. Source: https://github.com/tatsu-lab/stanford_alpaca, train.py."""
BARE_PROMPT, BARE_INPUT_PROMPT = "{instruction}", "{instruction}\n\n{context}"
MATH_STOPS = ("Instruction:", "Instruction", "Response:", "Response")
"""Where generation stops in the evaluation of GSM8K and MATH, beside the end token."""


@dataclass(frozen=True)
class Schema:
    """Where a row holds its instruction and its response, and the prompt around them.

    Fields:
        instruction, response: columns; without an instruction the response is plain text.
        prompt: around the instruction of a row without a context.
        convert: applied to the response.
        context: column of a further input, empty in some rows.
        prompt_with_context: around the two.
        turns: column of a chat's turns, in place of instruction and response.
        as_chat: rows go through a chat template.
        chat_template: Jinja; none: the tokenizer's.
    """

    instruction: str | None
    response: str
    prompt: str = MATH_PROMPT
    convert: Callable[[str], str] = str
    context: str | None = None
    prompt_with_context: str = INPUT_PROMPT
    turns: str | None = None
    as_chat: bool = False
    chat_template: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that every row needs."""
        if self.turns:
            return (self.turns,)
        return tuple(column for column in (self.instruction, self.response) if column)

    @property
    def used(self) -> tuple[str, ...]:
        """Those that are looked at, where a row has them."""
        also = ("system", "tools") if self.turns else (self.context,)
        return *self.columns, *filter(None, also)

    def texts(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return a row's prompt and response; None where one of them is empty.

        Raises:
            UserError: a cell holds no text.
        """
        response = _text(row, self.response)
        if not response.strip():
            return None
        if self.instruction is None:
            return "", self.convert(response)
        instruction = _text(row, self.instruction)
        if not instruction.strip():
            return None
        context = _text(row, self.context) if self.context else ""
        prompt = self.prompt_with_context if context.strip() else self.prompt
        return prompt.format(instruction=instruction, context=context), self.convert(response)


def with_marker(answer: str) -> str:
    """Return a GSM8K answer in MetaMathQA's form: `... #### N`, then `The answer is: N`."""
    return f"{answer.rstrip()}\n{ANSWER_MARKER}{gold_number(answer)}"


SCHEMAS: dict[str, Schema] = {
    "metamath": Schema("query", "response"),
    "gsm8k": Schema("question", "answer", convert=with_marker),
    "commonsense": Schema("instruction", "output", prompt=COMMONSENSE_PROMPT),
    "alpaca": Schema("instruction", "output", context="input"),
    "prompt_completion": Schema("prompt", "completion", prompt=BARE_PROMPT),
    "text": Schema(None, "text"),
}
"""Those that a name says all of; `columns` names its own, and of `chat` there are two."""
CHAT_COLUMNS = ("messages", "conversations")


def schema_of(config: DataConfig, name: str | None = None, columns: Sequence[str] = ()) -> Schema:
    """Return where the config's rows hold what, and what is put around it.

    Args:
        name: the schema; none: the config's, where it is not auto.
        columns: that the rows have, for a chat's.

    Raises:
        UserError: the config puts something around it that cannot be.
    """
    name = name or config.schema
    fits = {"chat": ("auto", "chat"), "text": ("auto", "none")}.get(name)
    if fits and config.template not in fits:
        raise UserError(
            f"data.template: expected {fits[1]} with data.schema={name}, got {config.template}; "
            "leave it out"
        )
    if name == "chat":
        turns = next((column for column in CHAT_COLUMNS if column in columns), CHAT_COLUMNS[0])
        schema = Schema(None, "", turns=turns, as_chat=True)
    elif name == "columns":
        schema = Schema(config.prompt_column, config.response_column)
    else:
        schema = SCHEMAS[name]
    if config.template == "alpaca":
        schema = replace(schema, prompt=MATH_PROMPT, prompt_with_context=INPUT_PROMPT)
    if config.template in ("none", "chat"):
        schema = replace(schema, prompt=BARE_PROMPT, prompt_with_context=BARE_INPUT_PROMPT)
    as_chat = schema.as_chat or config.template == "chat"
    if config.chat_template and not as_chat:
        raise UserError(
            f"data.chat_template: rows of data.schema={name} go through none, got "
            f"{named(config.chat_template)}; set data.template=chat, or leave it out"
        )
    return replace(schema, as_chat=as_chat, chat_template=config.chat_template)


def recognise(row: Mapping[str, Any], source: str) -> str:
    """Return the name of the schema that the columns mean.

    Args:
        row: the first one.
        source: as the user would name it.

    Raises:
        UserError: none, or several, can be meant.
    """
    filled = {column for column, value in row.items() if value is not None}
    found = _known_by(filled, row)
    if len(found) != 1:  # a cell of the first row may be empty
        found = _known_by(set(row), row)
    if len(found) == 1:
        return found[0]
    listed = ", ".join(name if name == name.strip() else repr(name) for name in row)
    why = f"which may be {' or '.join(found)}" if found else "which no schema is known by"
    remedy = f"set data.schema={found[0]}" if found else "set data.schema"
    divider = {";" in listed: "semicolons", "\t" in listed: "tabs"}.get(True)
    if len(row) == 1 and divider:
        why = f"as its cells are divided by {divider}"
        remedy = "save it with commas, set data.schema"
    if any(isinstance(row.get(column), str) for column in CHAT_COLUMNS):
        why = "whose turns are a text"
        remedy = "write them as a list of JSON (json.loads of the text), set data.schema"
    raise UserError(
        f"{source}: data.schema=auto: got columns {listed[:200]}, {why}; {remedy}, or columns with "
        "data.prompt_column and data.response_column"
    )


def _known_by(columns: set[str], row: Mapping[str, Any]) -> list[str]:
    """Return the schemas that rows with these columns may be of."""
    found = []
    if any(isinstance(row.get(column), list) for column in CHAT_COLUMNS):
        found.append("chat")
    if {"instruction", "output"} <= columns:
        found += ["alpaca", "commonsense"] if "answer" in columns else ["alpaca"]
    found += [name for name in ("metamath", "prompt_completion") if _fits(name, columns)]
    if _fits("gsm8k", columns) and "####" in str(row["answer"]):
        found.append("gsm8k")
    return found or ["text"] * ("text" in columns)


def _fits(name: str, columns: set[str]) -> bool:
    return set(SCHEMAS[name].columns) <= columns


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, list | dict):
        raise UserError(
            f"expected text in {column}, got {shown(value)}; chats go in a column {CHAT_COLUMNS[0]}"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise UserError(
            f"expected text in {column}, got {shown(value)}, which has several spellings; put it "
            "in quotes"
        )
    return "" if value is None else str(value)
