"""Chats: a row's turns, the template that makes them one text, and which tokens are trained.

Trained are the assistant's words and what the template ends its turn with. They are found without
marks in the template: an assistant's turn begins where the text of the turns before it, with the
template's own generation prompt, ends, so that training goes on from what a server asks with.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from fedex_scale.config.words import named
from fedex_scale.data.template_trial import check_ends
from fedex_scale.data.turns import Tools, Turns
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

_TRIAL = [{"role": role, "content": "Well?"} for role in ("user", "assistant", "user")]
TEMPLATES = Path(__file__).with_name("chat_templates")
# A template that tells the model the date would make other tokens every day. A template is given
# plain data only, so that the date's function has to be one of its own.
_DATE = "26 Jul 2024"
_PARTS = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24"}
_DATE_FUNCTION = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{part}', '{value}')" for part, value in _PARTS.items())
    + " }}{% endmacro %}{{ '' }}"
)


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


def render(
    turns: Turns,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ask: bool,
    tools: Tools | None = None,
) -> str:
    """Return the template's text of the turns.

    Args:
        ask: end with the prompt that an assistant's turn follows.
        tools: that the model may call.

    Raises:
        UserError: the template refuses them.
    """
    _try_out(template)
    try:
        return _text(turns, template, tokenizer.special_tokens_map, ask=ask, tools=tools)
    except Exception as error:  # a template is a program, and may do anything wrong
        raise UserError(
            f"the chat template refuses the turns ({type(error).__name__}: {error!s:.100}); change "
            "them, or set data.chat_template"
        ) from None


def _text(
    turns: Turns,
    template: str,
    tokens: Mapping[str, Any],
    *,
    ask: bool,
    tools: Tools | None = None,
) -> str:
    (text,), _ = render_jinja_template(
        conversations=[turns],
        tools=tools,
        chat_template=_DATE_FUNCTION * ("strftime_now" in template) + template,
        add_generation_prompt=ask,
        date_string=_DATE,
        **tokens,
    )
    return text


@cache
def _try_out(template: str) -> None:
    check_ends(lambda: _text(_TRIAL, template, {}, ask=True))


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

    def encode(self, turns: Turns, tools: Tools | None = None) -> tuple[list[int], list[bool]]:
        """Return a chat's tokens, and which are trained.

        Raises:
            UserError: the assistant's tokens cannot be told, or the template leaves something out.
        """
        text = self._render(turns, tools)
        self._check_shown(text, turns, tools)
        spans = list(self._spans(text, turns, tools))
        tokens, trained = self._marks.tokens(text, [(begin, end) for begin, _, end in spans])
        answered = turns[-1]["role"] == "assistant" and turns[-1].get("weight") != 0
        if answered and any(trained):
            last = max(i for i, own in enumerate(trained) if own)
            _, words_end, end = spans[-1]
            if not self._marks.ends_turn(text[words_end:end], tokens[last]):
                tokens = [*tokens[: last + 1], self._tokenizer.eos_token_id]
                trained = [*trained[: last + 1], True]
        return tokens, trained

    def _render(self, turns: Turns, tools: Tools | None, *, ask: bool = False) -> str:
        return render(turns, self._template, self._tokenizer, ask=ask, tools=tools)

    def _spans(
        self, text: str, turns: Turns, tools: Tools | None
    ) -> Iterator[tuple[int, int, int]]:
        """Yield where each trained turn begins, its words end, and what it ends with ends."""
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant" or turn.get("weight") == 0:
                continue
            asked = self._render(turns[:number], tools, ask=True)
            words = turn["content"].strip()
            at = text.find(words, len(asked)) if text.startswith(asked) else -1
            words_end = at + len(words)
            end = self._marks.end_of_turn(text, words_end)
            if turn.get("tool_calls") or end == words_end:  # what the template writes by itself
                upto = self._render(turns[: number + 1], tools)
                end = _end_of_both(text, upto, words_end)
                if turn.get("tool_calls") and not len(asked) < len(upto.rstrip()) == end:
                    at = -1
            if at < 0 or not self._marks.only_marks(text[len(asked) : at]):
                raise UserError(
                    f"the chat template does not show turn {number + 1} after its own generation "
                    "prompt and as it is written, so that its tokens cannot be told; set "
                    "data.chat_template"
                )
            yield len(asked), words_end, end

    def _check_shown(self, text: str, turns: Turns, tools: Tools | None) -> None:
        """Raise a UserError for tools, and for what a turn says, that the template leaves out."""
        if tools and self._render(turns, None) == text:
            self._refuse("the row's tools")
        whats = {"tool": "what a tool gave", "system": "the system's", "user": "the user's"}
        for number, turn in enumerate(turns):
            called, role = turn.get("tool_calls"), turn["role"]
            if not called and (role == "assistant" or turn["content"].strip() in text):
                continue
            other = (
                {"tool_calls": _renamed(called)} if called else {"content": f"{turn['content']}."}
            )
            others = [*turns[:number], turn | other, *turns[number + 1 :]]
            if self._render(others, tools) == text:
                self._refuse(f"turn {number + 1}, {'a tool call' if called else whats[role]}")

    def _refuse(self, what: str) -> None:
        raise UserError(
            f"the chat template does not show {what}; set data.chat_template to one that does, or "
            "take the row out"
        )


def _end_of_both(text: str, upto: str, at: int) -> int:
    """Return where the words end that follow `at` in both texts, which agree up to there."""
    if text.startswith(upto[:at]):
        for word in re.compile(r"\s*\S+").finditer(upto, at):
            if not text.startswith(word[0], at):
                break
            at = word.end()
    return at


def _renamed(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls to functions of another name."""
    return [
        call | {"function": call["function"] | {"name": f"{call['function']['name']}_"}}
        for call in calls
    ]


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

    def ends_turn(self, written: str, last: int) -> bool:
        """Tell whether a token ends the turn.

        Args:
            written: what the template writes after the turn's words.
            last: the last trained token.
        """
        return last in self._ends or (bool(written.strip()) and self.only_marks(written))

    def tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return a text's tokens, and which stand in one of the spans.

        Where a token would reach over the begin of a span, as over a space that the template asks
        with, what stands before and after is tokenized apart: a model goes on from the tokens that
        it is asked with. A server that tokenizes the answer anew, for the next one, joins them.
        """
        marks = [0, *(found.start() for found in self._any.finditer(text))]
        cuts: list[int] = []
        while True:
            ids, starts, after = self._pieces(text, cuts)
            firsts = {
                begin: after.get(begin) or self._first(text, ids, starts, marks, begin)
                for begin, _ in spans
            }
            over = [begin for begin, first in firsts.items() if first is None]
            if not over:
                break
            cuts, marks = sorted([*cuts, *over]), sorted([*marks, *over])
        trained = [False] * len(ids)
        for (_, end), first in zip(spans, firsts.values(), strict=True):
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

    def _pieces(
        self, text: str, cuts: Sequence[int]
    ) -> tuple[list[int], list[int], dict[int, int]]:
        """Return the tokens of the pieces between the cuts, where in the text each token begins,
        and which token is the first after each cut."""
        ids: list[int] = []
        starts: list[int] = []
        firsts: dict[int, int] = {}
        for begin, end in pairwise([0, *cuts, len(text)]):
            piece = self._tokenizer(
                text[begin:end], add_special_tokens=False, return_offsets_mapping=True
            )
            firsts[begin] = len(ids)
            ids += piece["input_ids"]
            starts += [begin + start for start, _ in piece["offset_mapping"]]
        return ids, starts, firsts
