"""Chats: a row's turns, the template that makes them one text, and which tokens are trained.

Trained are the assistant's words and the token that ends its turn. They are found without marks in
the template: an assistant's turn begins where the text of the turns before it, with the template's
own generation prompt, ends, so that training goes on from what a server asks with.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedex_scale.config.words import named, shown
from fedex_scale.data.places import text_of
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

TEMPLATES = Path(__file__).with_name("chat_templates")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant"}
# A template that tells the model the date would make other tokens every day. A template is given
# plain data only, so that the date's function has to be one of its own.
_DATE = "26 Jul 2024"
_PARTS = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}
_DATE_FUNCTION = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{part}', '{value}')" for part, value in _PARTS.items())
    + " }}{% endmacro %}{{ '' }}"
)
Turns = list[dict[str, Any]]
"""Of each its role and its content; a `weight` of 0 is an answer that is not trained."""


def template_of(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template as Jinja.

    Args:
        name: `data.chat_template`; none: the tokenizer's own.

    Raises:
        UserError: there is none.
    """
    known = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    if name is None:
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own:
            return own
        raise UserError(
            "model.path: chats need a chat template, and this model's tokenizer has none; set "
            f"data.chat_template to {' or '.join(known)} (any model), or to a Jinja file"
        )
    path = TEMPLATES / f"{name}.jinja" if name in known else Path(name)
    try:
        return door.read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.chat_template: expected one of {', '.join(known)} or a Jinja file, got "
            f"{named(name)} ({getattr(error, 'strerror', None) or 'not UTF-8'}); correct it"
        ) from None


def turns_of(row: Mapping[str, Any], column: str) -> Turns:
    """Return a row's turns as role and content, of OpenAI's or ShareGPT's form.

    Raises:
        UserError: they are no chat; the message begins with what was expected.
    """
    told = row[column]
    if not isinstance(told, list) or not told:
        raise UserError(f"expected a list of turns in {column}, got {shown(told)}; correct it")
    before, turns = row.get("system"), []
    if isinstance(before, str) and before.strip() and column != "messages":
        turns.append({"role": "system", "content": before})
    for turn in told:
        turns.append(_turn(turn, len(turns) + 1))
    _check_order(turns)
    return turns


def render(turns: Turns, template: str, tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    """Return the template's text of the turns.

    Args:
        ask: end with the prompt that an assistant's turn follows.

    Raises:
        UserError: the template refuses them.
    """
    try:
        (text,), _ = render_jinja_template(
            conversations=[turns],
            chat_template=_DATE_FUNCTION * ("strftime_now" in template) + template,
            add_generation_prompt=ask,
            date_string=_DATE,
            **tokenizer.special_tokens_map,
        )
        return text
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise UserError(
            f"the chat template refuses the turns ({type(error).__name__}: {error!s:.100}); change "
            "them, or set data.chat_template"
        ) from None


def _turn(turn: Any, number: int) -> dict[str, Any]:
    """Return a turn as role and content, and a weight of 0 where it has that."""
    keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    role, content = (turn.get(key) if isinstance(turn, dict) else None for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(
            f"turn {number}: expected {keys[0]} to be one of {', '.join(_ROLES)}, got "
            f"{shown(role if isinstance(turn, dict) else turn)}; take the row out or rewrite it"
        )
    content = text_of(content)
    if not isinstance(content, str) or not content.strip():
        got = (
            "an empty turn" if content in (None, "") or isinstance(content, str) else shown(content)
        )
        raise UserError(
            f"turn {number}: expected text in {keys[1]}, got {got}; take the row out or rewrite it"
        )
    untrained = {"weight": 0} if turn.get("weight") == 0 else {}
    return {"role": _ROLES[role], "content": content, **untrained}


def _check_order(turns: Turns) -> None:
    first = int(turns[0]["role"] == "system")
    for number, turn in enumerate(turns[first:], start=first):
        expected = ("user", "assistant")[(number - first) % 2]
        if turn["role"] != expected:
            raise UserError(
                f"turn {number + 1}: expected {expected}, as user and assistant take turns, got "
                f"{turn['role']}; take the row out or join its turns"
            )
    if len(turns) - first < 2:
        raise UserError("expected a turn of the assistant, got none; take the row out")


def _any_of(texts: set[str]) -> str:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"


class ChatEncoder:
    """A chat template with a tokenizer: turns in, tokens and which of them are trained out."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                "model.path: chats need a fast tokenizer, which tells where its tokens stand, got "
                f"{type(tokenizer).__name__}; add its tokenizer.json"
            )
        self._template, self._tokenizer = template, tokenizer
        self._marks = _Marks(tokenizer)

    def encode(self, turns: Turns) -> tuple[list[int], list[bool]]:
        """Return a chat's tokens, and which are trained.

        Raises:
            UserError: the assistant's tokens cannot be told.
        """
        text = render(turns, self._template, self._tokenizer, ask=False)
        tokens, trained = self._marks.tokens(text, list(self._spans(text, turns)))
        answered = turns[-1]["role"] == "assistant" and any(trained)
        if answered and not self._marks.ends_turn(tokens, trained):
            return [*tokens, self._tokenizer.eos_token_id], [*trained, True]
        return tokens, trained

    def _spans(self, text: str, turns: Turns) -> Iterator[tuple[int, int]]:
        """Yield where each assistant's turn begins and ends in the text."""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant" or turn.get("weight") == 0:
                continue
            asked = render(turns[:number], self._template, self._tokenizer, ask=True)
            words = turn["content"].strip()
            at = text.find(words, len(asked)) if text.startswith(asked) else -1
            if at < 0 or not self._marks.only_marks(text[len(asked) : at]):
                raise UserError(
                    f"the chat template does not show turn {number + 1} after its own generation "
                    "prompt and as it is written, so that its tokens cannot be told; set "
                    "data.chat_template"
                )
            yield len(asked), self._marks.end_of_turn(text, at + len(words))


class _Marks:
    """A tokenizer's added tokens, such as those that end a turn, and where tokens stand in a text.

    Around added tokens a text is tokenized in pieces that know nothing of each other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, token in added.items() if token.special}
        special.add(tokenizer.eos_token)
        self._tokenizer = tokenizer
        self._any = re.compile(_any_of({*added, *special}))
        self._end = re.compile(rf"\s*(?:{_any_of(special)})")
        self._ends = {tokenizer.convert_tokens_to_ids(text) for text in special}
        self._known: dict[str, list[int]] = {}

    def only_marks(self, text: str) -> bool:
        """Tell whether a text is white space and added tokens alone."""
        return not self._any.sub("", text).strip()

    def end_of_turn(self, text: str, at: int) -> int:
        """Return where a turn ends whose words end at `at`: after its end token, if it has one."""
        found = self._end.match(text, at)
        return found.end() if found else at

    def ends_turn(self, tokens: Sequence[int], trained: Sequence[bool]) -> bool:
        """Tell whether the last trained token ends a turn."""
        return tokens[max(i for i, own in enumerate(trained) if own)] in self._ends

    def tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return a text's tokens, and which stand in one of the spans.

        Where a token would reach over the begin of a span, what stands before and after is
        tokenized apart: a model goes on from the tokens that it is asked with.
        """
        marks = [0, *(found.start() for found in self._any.finditer(text))]
        begins = [begin for begin, _ in spans]
        ids, starts, _ = self._pieces(text, [])
        firsts = [self._first(text, ids, starts, marks, begin) for begin in begins]
        if None in firsts:
            ids, starts, firsts = self._pieces(text, begins)
        trained = [False] * len(ids)
        for (_, end), first in zip(spans, firsts, strict=True):
            last = bisect_left(starts, end)
            trained[first:last] = [True] * (last - first)
        trained[0] = False  # nothing tells the first token
        return ids, trained

    def _first(
        self, text: str, ids: list[int], starts: list[int], marks: list[int], begin: int
    ) -> int | None:
        """Return the first token of a span; None where a token reaches over its begin."""
        mark = marks[max(0, bisect_left(marks, begin) - 1)]
        before = self._alone(text[mark:begin])
        at = bisect_left(starts, mark)
        first = at + len(before)
        return first if ids[at:first] == before else None

    def _alone(self, text: str) -> list[int]:
        """Return the tokens of a template's words, of which there are few."""
        if text not in self._known:
            found = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(text) > 100:
                return found
            self._known[text] = found
        return self._known[text]

    def _pieces(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of the pieces between the cuts, where in the text each token begins,
        and which token is the first after each cut."""
        ids: list[int] = []
        starts: list[int] = []
        firsts = []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = self._tokenizer(
                text[begin:end], add_special_tokens=False, return_offsets_mapping=True
            )
            firsts.append(len(ids))
            ids += piece["input_ids"]
            starts += [begin + start for start, _ in piece["offset_mapping"]]
        return ids, starts, firsts[1:]
