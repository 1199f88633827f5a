"""A user's own prompts, answered before and after training, side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fedex_scale.config.words import named
from fedex_scale.data.chat import render, template_of
from fedex_scale.data.prompts import BARE_PROMPT, Schema
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import distributed, door
from fedex_scale.runtime.errors import UserError, reading
from fedex_scale.runtime.outputs import make_inside, write_file
from fedex_scale.scoring.evaluation import as_it_was
from fedex_scale.scoring.spread import BatchSize, spread_requests

ANSWERS, PAGE = "answers.jsonl", "answers.md"
MAX_BYTES, MAX_PROMPTS, MAX_NEW_TOKENS = 1_000_000, 200, 256


def read_prompts(file: str) -> list[str]:
    """Return the prompts of a text file, one a line; lines that are empty are none.

    Raises:
        UserError: it cannot be read, or holds none, or too many.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"evaluation.generate: expected a text file, found none at {named(file)}")
    with path.open("rb") as lines:
        raw = lines.read(MAX_BYTES + 1)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"evaluation.generate: {named(file)}: line {line}: expected UTF-8, got the byte "
            f"{raw[error.start]:#04x}; save it as UTF-8"
        ) from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 0 < len(prompts) <= MAX_PROMPTS or len(raw) > MAX_BYTES:
        raise UserError(
            f"evaluation.generate: {named(file)}: expected 1 to {MAX_PROMPTS} prompts, one a line, "
            f"of {MAX_BYTES:,} bytes together, got {len(prompts)}; change it"
        )
    return prompts


def texts_of(
    prompts: Sequence[str], schema: Schema, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the prompts in the form of the training data; a chat's has its begin token."""
    if schema.as_chat:
        template = template_of(schema.chat_template, tokenizer)
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [render(turns, template, tokenizer, ask=True) for turns in asked]
    around = schema.prompt if schema.instruction else BARE_PROMPT
    return [around.format(instruction=prompt) for prompt in prompts]


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    as_chat: bool,
    batch_size: BatchSize,
) -> list[str]:
    """Return what the model writes after each text, greedily; every rank must take part.

    Args:
        as_chat: the texts have their begin token; to others the tokenizer adds its own.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    with as_it_was(model), torch.no_grad():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False if as_chat else None)
        most = max(1, min(MAX_NEW_TOKENS, lm.max_length // 2))  # a short context holds the prompt
        options = {"until": [], "max_gen_toks": most, "do_sample": False}
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(text, dict(options)), idx=0)
            for text in texts
        ]
        spread_requests(lm, batch_size)
        return lm.generate_until(requests)


def write_answers(run: RunDir, round: int, prompts: Sequence[str], given: Sequence[str]) -> None:
    """Write a round's answers, and answers.md with the first and the last round's side by side."""
    if not distributed.is_main():
        return
    folder = run.evaluation(round)
    make_inside(folder)
    rows = [{"prompt": x, "answer": y} for x, y in zip(prompts, given, strict=True)]
    write_file(folder / ANSWERS, "".join(json.dumps(row) + "\n" for row in rows))
    first = run.evaluation(0) / ANSWERS
    before = _read(first) if first.is_file() and round else None
    write_file(run.path / PAGE, page(prompts, before, given, round))


def page(
    prompts: Sequence[str], before: Mapping[str, str] | None, after: Sequence[str], round: int
) -> str:
    """Return Markdown with a table a prompt.

    Args:
        before: by prompt; none of it for one that was not asked then.
    """
    after_name = f"after round {round}" if round else "before training"
    lines = ["# Answers", ""]
    for number, (prompt, answer) in enumerate(zip(prompts, after, strict=True)):
        heads, cells = [after_name], [answer]
        if before is not None:
            heads, cells = (
                ["before training", after_name],
                [before.get(prompt, "not asked"), answer],
            )
        lines += [f"## {number + 1}. {_cell(prompt)}", "", f"| {' | '.join(heads)} |"]
        lines += ["|---" * len(heads) + "|", f"| {' | '.join(map(_cell, cells))} |", ""]
    return "\n".join(lines)


def _read(file: Path) -> dict[str, str]:
    with reading(file, "delete it, and the answers before training are not shown"):
        rows = [door.parse_json(line) for line in door.read_lines(file, inside=file.parent)]
        return {str(row["prompt"]): str(row["answer"]) for row in rows}


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is, within a table."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    shown = html.escape(shown, quote=False)
    for mark in "\\`*_[]|~":
        shown = shown.replace(mark, f"&#{ord(mark)};")
    return shown.replace("\n", "<br>")
