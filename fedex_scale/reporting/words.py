"""How a report writes numbers, and what a table of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedex_scale.reporting.chart import Record
from fedex_scale.runtime.scores import score_text

Table = dict[str, Any]
"""head, rows, caption; about: a sentence for each head; facts: cells are text; wide: it takes the
page's width."""


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    about: Mapping[str, str] | None = None,
) -> Table:
    """Return a table of numbers; wide if its longest cells would not fit half a page.

    Args:
        about: what the columns of these heads hold, a sentence each.
    """
    columns = zip(head, *rows, strict=True)
    wide = sum(max(map(len, column)) + 4 for column in columns) > 80
    return {
        "head": head,
        "rows": rows,
        "caption": caption,
        "about": {name: (about or {}).get(name, "") for name in head},
        "facts": False,
        "wide": wide,
    }


def percent(share: float) -> str:
    """Return a share of at least 0 in percent: 0%, 0.034%, 1.92%."""
    value = 100 * share
    return f"{value:.{2 if value >= 1 else 3}f}%" if value else "0%"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def score_of(score: Record | None) -> str:
    return f"{score_text(score['metric'], score['value'])}{error_of(score)}" if score else "-"


def error_of(score: Record) -> str:
    return f" ± {100 * score['stderr']:.1f}" if score["stderr"] is not None else ""


def rows_told(partition: Record) -> str | None:
    """Return what became of the rows that are not trained whole; None where all are."""
    parts = {what: partition.get(what, 0) for what in ("empty", "dropped", "truncated")}
    words = {"empty": "empty", "dropped": "without room for a response", "truncated": "cut"}
    listed = ", ".join(f"{count:,} {words[what]}" for what, count in parts.items() if count)
    return f"{listed}, of {partition['rows']:,} rows" if listed and "rows" in partition else None
