"""Figures of a run's training: scores and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

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


def loss(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw the training loss of each client, one round after another."""
    lines: dict[tuple[int, int], list[tuple[int, float]]] = {}
    start, longest, last = 0, 0, 0
    starts = {}
    for step in record["steps"]:
        if step["round"] != last:
            start, longest, last = start + longest, 0, step["round"]
            starts[last] = start
        longest = max(longest, step["step"])
        line = lines.setdefault((step["client"], step["round"]), [])
        line.append((start + step["step"], step["loss"]))
    if not lines:
        return None
    clients = sorted({client for client, _ in lines})
    few = len(clients) <= len(SERIES)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (client, _), line in lines.items():
            x, y = zip(*line, strict=True)
            i = clients.index(client)
            style = {"color": SERIES[i % 8]} if few else {"color": SERIES[0], "alpha": 0.3}
            label = f"client {client}" if few and line is _first(lines, client) else None
            axes.plot(x, y, label=label, marker="o" if len(x) < 3 else None, **style)
        for round, at in starts.items():
            if len(starts) > 1 and at:
                axes.axvline(at + 0.5, color=TEXT, linewidth=0.8, linestyle=":")
            if 1 < len(starts) <= 6:
                where = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8}
                axes.annotate(f" round {round}", (at + 0.5, 1), **where)
        axes.set_xlabel("optimizer step of a client")
        highest = max(step["loss"] for run in (record, *among) for step in run["steps"])
        axes.set_ylim(0, 1.05 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        legend(figure, axes)

    columns = ("round", "client", "step", "loss", "lr", "tokens")
    return Chart(
        name=f"{record['name']}-loss",
        title="Training loss of each client",
        caption="Each client starts from the server's model."
        + " Rounds follow one another." * (len(starts) > 1)
        + f" {len(clients)} clients, a line each." * (not few),
        columns=columns,
        rows=[[step[column] for column in columns] for step in record["steps"]],
        draw=draw,
    )


def _first(lines: dict[tuple[int, int], list], client: int) -> list:
    return next(line for (who, _), line in lines.items() if who == client)


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
