"""Figures of the training loss and the learning rate: of each client, and of runs beside others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedex_scale.reporting.chart import SERIES, TEXT, Chart, Record, legend

Line = list[tuple[int, float]]
"""A client's losses in one round, by step of the run: rounds follow one another."""


def loss(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw the training loss of each client; of more than eight, the band that they fill."""
    lines, starts = _lines(record)
    if not lines:
        return None
    clients = sorted({client for client, _ in lines})
    few = len(clients) <= len(SERIES)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        (_draw_each if few else _draw_band)(axes, lines, clients)
        _mark_rounds(axes, starts)
        axes.set_xlabel("optimizer step of a client")
        axes.set_ylim(_limits(step["loss"] for run in (record, *among) for step in run["steps"]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        legend(figure, axes)

    columns = ("round", "client", "step", "loss", "lr", "tokens")
    return Chart(
        name=f"{record['name']}-loss",
        title="Training loss of each client",
        caption="Each client starts from the server's model."
        + " Rounds follow one another." * (len(starts) > 1)
        + f" {len(clients)} clients: the band from the lowest to the highest, the median, and the "
        "two that end the last round lowest and highest."
        * (not few)
        + " The axis begins at the lowest loss.",
        columns=columns,
        rows=[[step[column] for column in columns] for step in record["steps"]],
        draw=draw,
    )


def learning_rate(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw the learning rate of the client with the most steps, one round after another."""
    lines, starts = _lines(record, "lr")
    if not lines:
        return None
    longest = [
        max((line for (_, at), line in lines.items() if at == round), key=len) for round in starts
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for line in longest:
            x, y = zip(*line, strict=True)
            axes.plot(x, y, color=SERIES[0], marker="o" if len(x) < 3 else None)
        _mark_rounds(axes, starts)
        axes.set_xlabel("optimizer step of a client")
        axes.set_ylim(0, 1.05 * max(y for line in longest for _, y in line) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_formatter("{x:.3g}")

    return Chart(
        name=f"{record['name']}-learning-rate",
        title="Learning rate",
        caption="Of the client with the most steps in each round; every client begins anew.",
        columns=("step", "lr"),
        rows=[point for line in longest for point in line],
        draw=draw,
    )


def rates(record: Record) -> tuple[tuple[int, int, float], ...]:
    """Return what of a run's learning rate makes it another one's."""
    return tuple((step["round"], step["step"], step["lr"]) for step in record["steps"])


def losses_compared(records: Sequence[Record]) -> Chart | None:
    """Draw the mean loss over the clients of each run, all in one."""
    means: dict[str, list[Line]] = {}
    for run in records:
        lines, starts = _lines(run)
        means[run["name"]] = [
            _over_clients((x for (_, at), x in lines.items() if at == round), fmean)
            for round in starts
        ]
    rows = [(name, *point) for name, rounds in means.items() for x in rounds for point in x]
    if not rows:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, rounds) in enumerate(means.items()):
            for number, line in enumerate(rounds):
                x, y = zip(*line, strict=True)
                label = name if number == 0 else None
                mark = "o" if len(x) < 3 else None
                axes.plot(x, y, color=SERIES[i % 8], label=label, marker=mark)
        axes.set_xlabel("optimizer step of a client")
        axes.set_ylim(_limits(row[2] for row in rows))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        legend(figure, axes)

    return Chart(
        name="losses-compared",
        title="Training loss of each run",
        caption="Mean over the clients of a round; rounds follow one another. The axis begins at "
        "the lowest loss.",
        columns=("run", "step", "loss"),
        rows=rows,
        draw=draw,
    )


def _lines(
    record: Record, what: str = "loss"
) -> tuple[dict[tuple[int, int], Line], dict[int, int]]:
    """Return the lines by client and round, and after how many steps each round starts."""
    lines: dict[tuple[int, int], Line] = defaultdict(list)
    starts: dict[int, int] = {}
    start, longest, last = 0, 0, None
    for step in record["steps"]:
        if step["round"] != last:
            start, longest, last = start + longest, 0, step["round"]
            starts[last] = start
        longest = max(longest, step["step"])
        lines[step["client"], step["round"]].append((start + step["step"], step[what]))
    return dict(lines), starts


def _over_clients(lines: Iterable[Line], value) -> Line:
    """Return one line: the value of all lines at each step that any of them has."""
    at: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        for x, y in line:
            at[x].append(y)
    return [(x, value(at[x])) for x in sorted(at)]


def _draw_each(axes: Axes, lines: dict[tuple[int, int], Line], clients: Sequence[int]) -> None:
    named: set[int] = set()
    for (client, _), line in lines.items():
        x, y = zip(*line, strict=True)
        label = None if client in named else f"client {client}"
        named.add(client)
        style = {"color": SERIES[clients.index(client) % 8]}
        axes.plot(x, y, label=label, marker="o" if len(x) < 3 else None, **style)


def _draw_band(axes: Axes, lines: dict[tuple[int, int], Line], clients: Sequence[int]) -> None:
    rounds = sorted({round for _, round in lines})
    for round in rounds:
        own = [line for (_, at), line in lines.items() if at == round]
        low, middle, high = (_over_clients(own, value) for value in (min, median, max))
        x, lowest, highest = [p[0] for p in low], [p[1] for p in low], [p[1] for p in high]
        first = round == rounds[0]
        if len(x) == 1:  # a band needs two ends
            axes.vlines(x, lowest, highest, color=SERIES[0], alpha=0.3, linewidth=8)
        label = f"all {len(clients)} clients" if first else None
        axes.fill_between(x, lowest, highest, color=SERIES[0], alpha=0.25, linewidth=0, label=label)
        style = {"color": SERIES[0], "marker": "o" if len(x) < 3 else None}
        axes.plot(x, [p[1] for p in middle], label="median" if first else None, **style)
    ends = {client: line[-1][1] for (client, round), line in lines.items() if round == rounds[-1]}
    chosen = {"lowest": min(ends, key=ends.get), "highest": max(ends, key=ends.get)}
    for i, (word, client) in enumerate(chosen.items(), start=1):
        label = f"client {client}, {word} at the end"
        for round in rounds:
            if (client, round) in lines:
                x, y = zip(*lines[client, round], strict=True)
                mark = "." if len(x) < 3 else None
                axes.plot(x, y, color=SERIES[i], linewidth=1, marker=mark, label=label)
                label = None


def _mark_rounds(axes: Axes, starts: dict[int, int]) -> None:
    left = axes.get_xlim()[0]  # within the axes, beside whose top the largest number stands
    for round, at in starts.items():
        if len(starts) > 1 and at:
            axes.axvline(at + 0.5, color=TEXT, linewidth=0.8, linestyle=":")
        if 1 < len(starts) <= 6:
            where = {"xycoords": ("data", "axes fraction"), "va": "top", "fontsize": 8}
            axes.annotate(f" round {round}", (max(at + 0.5, left), 1), **where)


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Return an axis that what there is fills, so that slow learning shows."""
    known = list(values)
    low, high = min(known), max(known)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return low - room, high + 2 * room
