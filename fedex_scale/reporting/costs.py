"""Figures of what a run costs: traffic, time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from fedex_scale.reporting.chart import SERIES, Chart, Record, legend
from fedex_scale.runtime.phases import PHASES

_COLORS = dict(zip(PHASES, (5, 3, 0, 6, 2, 1, 4, 7), strict=True))


def traffic(record: Record) -> Chart | None:
    """Draw what a client sends and receives in a round under each method."""
    rows = [row for row in record["communication"] if row["method"] != "full"]
    if not rows:
        return None
    labels = [row["label"] for row in rows]
    labels[0] = f"this run: {labels[0]}"
    parts = {"adapter, up": "up", "adapter, down": "down_adapter", "base update": "down_base"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for i, (label, key) in enumerate(parts.items()):
            values = [row[key] * row["dtype_bytes"] / 1e6 for row in rows]
            axes.barh(range(len(rows)), values, 0.62, left=left, color=SERIES[i], label=label)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("MB of one client in one round")
        axes.grid(visible=False, axis="y")
        legend(figure, axes)

    return Chart(
        name=f"{record['name']}-communication",
        title="Communication",
        caption="What one client would send and receive in a round; the initial model is apart.",
        columns=tuple(rows[0]),
        rows=[tuple(row.values()) for row in record["communication"]],
        draw=draw,
        height=1.3 + 0.3 * len(rows),
    )


def seconds_by_phase(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw where the wall time of each round went."""
    laps = [lap for lap in record["phases"] if lap["wall_s"] > 0]
    names = [name for name in PHASES if any(name in lap["phases"] for lap in laps)]
    if not laps:
        return None
    shown = laps[:1] + laps[1:][-11:]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = [0.0] * len(shown)
        for name in names:
            values = [lap["phases"].get(name, {"seconds": 0})["seconds"] for lap in shown]
            color = SERIES[_COLORS[name]]
            axes.barh(range(len(shown)), values, 0.62, left=left, color=color, label=name)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(shown)), [lap_name(lap) for lap in shown])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_xlim(
            0, 1.03 * max(lap["wall_s"] for run in (record, *among) for lap in run["phases"])
        )
        axes.grid(visible=False, axis="y")
        legend(figure, axes)

    return Chart(
        name=f"{record['name']}-time",
        title="Time by phase",
        caption="Wall time of each round; every second counts once.",
        columns=("round", "phase", "seconds", "peak_bytes"),
        rows=[
            (lap_name(lap), name, usage["seconds"], usage["peak_bytes"])
            for lap in laps
            for name, usage in lap["phases"].items()
        ],
        draw=draw,
        height=1.5 + 0.26 * len(shown),
    )


def memory_by_phase(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw the largest memory of each phase, over all rounds."""
    peaks: dict[str, list[float]] = {}
    for lap in record["phases"]:
        for name, usage in lap["phases"].items():
            host, device = usage["peak_bytes"], usage.get("peak_device_bytes", 0)
            old = peaks.setdefault(name, [0.0, 0.0])
            peaks[name] = [max(old[0], host / 1e9), max(old[1], device / 1e9)]
    peaks = {name: peaks[name] for name in PHASES if name in peaks}
    if not any(host for host, _ in peaks.values()):
        return None
    parts = ["host"] + ["accelerator"] * any(device for _, device in peaks.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        height = 0.7 / len(parts)
        for i, part in enumerate(parts):
            at = [n + (i - (len(parts) - 1) / 2) * height for n in range(len(peaks))]
            values = [found[i] for found in peaks.values()]
            bars = axes.barh(at, values, height * 0.9, color=SERIES[i], label=part)
            axes.bar_label(bars, fmt="%.2g", padding=3, fontsize=8)
        axes.set_yticks(range(len(peaks)), list(peaks))
        axes.invert_yaxis()
        axes.set_xlabel("GB")
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        if len(parts) > 1:
            legend(figure, axes)

    return Chart(
        name=f"{record['name']}-memory",
        title="Peak memory by phase",
        caption="The largest resident memory of the process on the first rank in each phase.",
        columns=("phase", "host_gb", "device_gb"),
        rows=[(name, *found) for name, found in peaks.items()],
        draw=draw,
        height=1.1 + 0.26 * len(peaks) * len(parts),
    )


def lap_name(lap: Record) -> str:
    if lap["round"] is None:
        return "final files"
    return f"round {lap['round']}" if lap["round"] else "start"
