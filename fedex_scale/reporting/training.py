"""Figures of a run's scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedex_scale.reporting.chart import SERIES, TEXT, Chart, Record, legend


def scores(records: Sequence[Record]) -> Chart | None:
    """Draw every task's score before training and after it, with standard errors."""
    last = [scores_at(record, -1) for record in records]
    names = list(dict.fromkeys(name for found in last for name in found))
    if not names:
        return None
    bars = [("before", scores_at(records[0], 0, before=True))]
    bars = [bar for bar in bars if bar[1]]
    bars += [
        (r["name"] if len(records) > 1 else "after", x) for r, x in zip(records, last, strict=True)
    ]
    rows = [
        (name, label, found[name]["value"], found[name]["stderr"], found[name]["examples"])
        for label, found in bars
        for name in names
        if name in found
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(bars)
        for i, (label, found) in enumerate(bars):
            color = SERIES[7] if label == "before" else SERIES[(i - (len(bars) > len(records))) % 7]
            at = [n + (i + 0.5 - len(bars) / 2) * width for n in range(len(names))]
            values = [100 * found[n]["value"] if n in found else 0 for n in names]
            errors = [100 * _error(found.get(n)) for n in names]
            style = {"ecolor": TEXT, "capsize": 2, "error_kw": {"elinewidth": 1}}
            drawn = axes.barh(
                at, values, 0.9 * width, xerr=errors, color=color, label=label, **style
            )
            axes.bar_label(drawn, fmt="%.1f%%", padding=4, fontsize=8)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.grid(visible=False, axis="y")
        legend(figure, axes)

    return Chart(
        name="scores",
        title="Accuracy before and after",
        caption="Share of right answers; whiskers are one standard error.",
        columns=("task", "when", "value", "stderr", "examples"),
        rows=rows,
        draw=draw,
        height=1.2 + 0.22 * len(names) * len(bars) + 0.2 * len(names),
    )


def _error(score: Record | None) -> float:
    """Return the standard error; NaN, for which no whisker is drawn, where there is none."""
    return math.nan if score is None or score["stderr"] is None else score["stderr"]


def short(name: str) -> str:
    return name.removeprefix("fedex_").removesuffix("/exact_match").replace("_", " ")


def scores_at(record: Record, which: int, *, before: bool = False) -> dict[str, Record]:
    """Return the scores of the first or last evaluation, by task and metric."""
    rounds = sorted({score["round"] for score in record["scores"]})
    rounds = [round for round in rounds if (round == 0) == before]
    if not rounds:
        return {}
    return {
        f"{score['task']}/{score['metric']}": score
        for score in record["scores"]
        if score["round"] == rounds[which]
    }
