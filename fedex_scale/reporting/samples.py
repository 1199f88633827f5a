"""A few answers before and after training, from what lm-eval wrote down of each example."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime import door

SHOWN, LOOKED_AT, LONGEST = 3, 400, 700
"""Answers on the page, lines of a file that are read for them, and characters of each text."""


def samples(run: RunDir) -> list[dict[str, Any]]:
    """Return examples of the first task that writes answers, as different as there are.

    Each has task, prompt, target, and `before` and `after`: text and whether it is right, or None.
    """
    files = sorted(run.path.glob("evaluations/round-*/samples.jsonl"))
    if not files:
        return []
    first, last = (_read(file) for file in (files[0], files[-1]))
    before = first if files[0].parent == run.evaluation(0) else {}
    after = last if files[-1].parent != run.evaluation(0) else {}
    found = [
        {
            "task": key[0],
            "prompt": _short((after.get(key) or before[key])["prompt"], end=True),
            "target": _short(str((after.get(key) or before[key])["target"])),
            "before": _answer(before.get(key)),
            "after": _answer(after.get(key)),
        }
        for key in after or before
        if key in before or not before
    ]
    return _chosen(found)


def _read(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the first task's examples by number, as its first filter judges them."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in _rows(islice(door.read_lines(file), LOOKED_AT)):
        task = next(iter(found))[0] if found else row["task"]
        if row["task"] == task:
            found.setdefault((task, row["doc_id"]), row)
    return found


def _rows(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the examples whose answer is a text; a line that is damaged is none."""
    for line in lines:
        try:
            row = door.parse_json(line, finite=False)
            if isinstance(row["output"][0], str) and isinstance(row["prompt"], str):
                yield {
                    k: row[k] for k in ("task", "doc_id", "prompt", "output", "target", "verdict")
                }
        except (ValueError, LookupError, TypeError):
            continue


def _answer(row: dict[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    verdict = row["verdict"] if isinstance(row["verdict"], dict) else {}
    value = next(iter(verdict.values()), None)
    right = bool(value) if isinstance(value, (int, float)) else None
    return {"text": _short(row["output"][0]), "right": right}


def _chosen(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first of each kind of change, and then the first of the rest."""
    kinds: dict[tuple, dict[str, Any]] = {}
    for sample in found:
        kind = tuple(x and x["right"] for x in (sample["before"], sample["after"]))
        kinds.setdefault(kind, sample)
    chosen = [x for x in found if any(x is one for one in kinds.values())][:SHOWN]
    rest = [x for x in found if not any(x is one for one in chosen)]
    return [*chosen, *rest][:SHOWN]


def _short(text: str, *, end: bool = False) -> str:
    """Return a text that a page can hold; of a long one its beginning, or its end."""
    plain = "".join(c for c in text if c.isprintable() or c in "\n\t")
    if len(plain) <= LONGEST:
        return plain
    return f"… {plain[-LONGEST:]}" if end else f"{plain[:LONGEST]} …"
