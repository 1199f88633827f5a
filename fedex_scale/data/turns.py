"""A chat's turns, of OpenAI's or ShareGPT's form, checked, as a chat template takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedex_scale.config.words import named, shown
from fedex_scale.data.textfiles import text_of
from fedex_scale.runtime import door
from fedex_scale.runtime.errors import UserError

Turns = list[dict[str, Any]]
"""Of each its role and its content; a `weight` of 0 is an answer that is not trained. Those of the
assistant may have `tool_calls`, whose arguments are mappings."""
Tools = list[dict[str, Any]]
"""What the model may call, as JSON schemas of functions."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant", "tool": "tool"}
_ALSO = {"developer": "system", "observation": "tool", "function_call": "assistant"}
_AFTER = {"user": "assistant", "assistant": "user", "tool": "assistant"}
TURN_KEYS = frozenset("role content from value weight name tool_calls tool_call_id".split())
"""Those of a turn that are looked at; `function_call` is refused."""
_REWRITE = "take the row out or rewrite it"


def turns_of(row: Mapping[str, Any], column: str) -> Turns:
    """Return a row's turns as role and content, of OpenAI's or ShareGPT's form.

    Raises:
        UserError: they are no chat; the message begins with what was expected.
    """
    told = row[column]
    if not isinstance(told, list) or not told:
        raise UserError(f"expected a list of turns in {column}, got {shown(told)}; correct it")
    turns = [_turn(turn, number) for number, turn in enumerate(told, 1)]
    _check_order(turns)
    before = text_of(row.get("system"))
    if before is not None and not isinstance(before, str):
        raise UserError(f"system: expected text, got {shown(before)}; correct it")
    if not before or not before.strip():
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": before}, *turns]
    if turns[0]["content"] == before:
        return turns
    raise UserError(
        f"system: expected the same text as in the system turn of {column}, got another; keep one"
    )


def tools_of(row: Mapping[str, Any]) -> Tools | None:
    """Return the functions that a row's `tools` describe; None where it has none.

    Raises:
        UserError: they are no list of functions with names.
    """
    tools = []
    for tool in _listed(row.get("tools"), "tools"):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"tools: expected functions with a name, got {shown(tool)}; correct it")
        tools.append({"type": "function", "function": function})
    return tools or None


def _turn(turn: Any, number: int) -> dict[str, Any]:
    """Return a turn as role and content, and what else of it a template may need."""
    keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    role, content = (turn.get(key) if isinstance(turn, dict) else None for key in keys)
    if not isinstance(role, str) or role not in _ROLES | _ALSO:
        raise UserError(
            f"turn {number}: expected {keys[0]} to be one of {', '.join(_ROLES)}, got "
            f"{shown(role if isinstance(turn, dict) else turn)}; {_REWRITE}"
        )
    plain = {"role": (_ROLES | _ALSO)[role], "content": text_of(content)}
    calls, where = turn.get("tool_calls"), f"turn {number}: tool_calls"
    if role == "function_call":  # ShareGPT's, whose text is the call
        plain["content"], calls = "", content
    if turn.get("function_call") is not None:
        raise UserError(f"turn {number}: function_call is out of use; rewrite it as tool_calls")
    if calls := _calls(calls, where):
        if plain["role"] != "assistant":
            raise UserError(f"{where}: expected them in a turn of the assistant, got {role}")
        plain |= {"content": plain["content"] or "", "tool_calls": calls}
    _check_content(plain["content"], f"turn {number}", keys[1], may_be_empty=bool(calls))
    weight = turn.get("weight")
    if weight not in (None, 0, 1) or isinstance(weight, bool):
        raise UserError(
            f"turn {number}: expected a weight of 0 or 1, got {shown(weight)}; correct it"
        )
    if weight == 0:
        plain["weight"] = 0
    also = ("name", "tool_call_id") if plain["role"] == "tool" else ()
    return plain | {key: turn[key] for key in also if isinstance(turn.get(key), str)}


def _check_content(content: Any, where: str, key: str, *, may_be_empty: bool) -> None:
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        odd = next((kind for kind in kinds if kind != "text"), None)
        raise UserError(
            f"{where}: expected text, or parts of the type text, in {key}, got one of the type "
            f"{named(odd)}, which cannot be trained on; {_REWRITE}"
        )
    if not isinstance(content, str | None):
        raise UserError(f"{where}: expected text in {key}, got {shown(content)}; {_REWRITE}")
    if not may_be_empty and not (content or "").strip():
        raise UserError(f"{where}: expected text in {key}, got an empty turn; {_REWRITE}")


def _calls(told: Any, where: str) -> list[dict[str, Any]]:
    """Return calls with their arguments as mappings, as templates write them out themselves."""
    calls = []
    for call in _listed(told, where):
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: expected a function's name, got {shown(call)}; {_REWRITE}")
        arguments = _parsed(function.get("arguments") or {}, f"{where}: arguments of {named(name)}")
        if not isinstance(arguments, dict):
            raise UserError(
                f"{where}: expected the arguments of {named(name)} by their names, got "
                f"{shown(arguments)}; {_REWRITE}"
            )
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": name, "arguments": arguments}
        calls.append(known | {"type": "function", "function": function})
    return calls


def _listed(told: Any, where: str) -> list[dict[str, Any]]:
    """Return what is a list of mappings, or one, as such or as JSON in a text."""
    found = _parsed(told or [], where)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise UserError(f"{where}: expected a list of functions, got {shown(found)}; {_REWRITE}")
    return found


def _parsed(told: Any, where: str) -> Any:
    """Return what a text holds as JSON, and of anything else what is not null.

    A table's columns give each row the keys of all, as nulls.
    """
    try:
        return door.parse_json(told) if isinstance(told, str) else _filled(told)
    except ValueError:
        raise UserError(f"{where}: expected JSON, got {shown(told)}; correct it") from None


def _filled(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: _filled(value) for key, value in told.items() if value is not None}
    return [_filled(item) for item in told] if isinstance(told, list) else told


def _check_order(turns: Turns) -> None:
    """Raise a UserError where others than user and assistant, with tools called, take turns."""
    first = int(turns[0]["role"] == "system")
    before = "assistant"
    for number, turn in enumerate(turns[first:], start=first + 1):
        role, called = turn["role"], number > 1 and bool(turns[number - 2].get("tool_calls"))
        expected = "tool" if called else _AFTER[before]
        if role != expected and (role, before) != ("tool", "tool"):
            why = "as it was called" if called else "as user and assistant take turns"
            raise UserError(
                f"turn {number}: expected {expected}, {why}, got {role}; take the row out or join "
                "its turns"
            )
        before = role
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError("expected a turn of the assistant, got none; take the row out")
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise UserError(
            "expected an answer to train on, got ones of weight 0 only; take the row out"
        )
