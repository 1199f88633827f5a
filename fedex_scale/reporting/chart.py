"""One figure of a report with its numbers: for the page, and as PNG, SVG and CSV.

Colours are drawn as those of a light page. In the page, each becomes a CSS variable, so that the
same SVG reads well in light, in dark and in print.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = dict[str, Any]

TEXT, GRID = "#1c2430", "#d8dde5"
SERIES = "#2563c9 #d9730d #1a8f5c #a83fb5 #c8352b #0e8ea8 #8a6d1c #6b7280".split()
MARKERS = "osD^vPX*"
PALETTE = {TEXT: "var(--text)", GRID: "var(--line)", "#ffffff": "var(--card)"} | {
    color: f"var(--s{number})" for number, color in enumerate(SERIES, start=1)
}

STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
}
LETTER_IN, HANDLE_IN = 0.078, 0.55  # of a legend's label, and beside it
MAX_LABEL = 55  # letters: one column's


def legend(figure: Figure, axes: Axes) -> None:
    """Put the legend below, in as many columns, of at most four, as fit the figure's width."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [one if len(one) <= MAX_LABEL else f"{one[: MAX_LABEL - 1]}…" for one in labels]
        width = LETTER_IN * max(map(len, labels)) + HANDLE_IN
        columns = min(4, max(1, int(figure.get_figwidth() / width)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure with its numbers.

    Fields:
        name: of its files.
        title, caption: what is shown, and how to read it.
        rows: the numbers, under `columns`.
        draw: draws it into a figure.
        height: inches, of a width of 5.2.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    draw: Callable[[Figure], None] = field(repr=False)
    height: float = 3.0

    @cached_property
    def figure(self) -> Figure:
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(5.2, self.height), layout="constrained")
            self.draw(figure)
        return figure

    @cached_property
    def file(self) -> str:
        """The SVG as a file of its own, in the colours of a light page."""
        out = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        with mpl.rc_context(STYLE | {"svg.hashsalt": self.name}):
            self.figure.savefig(out, format="svg", metadata=nothing)
        return out.getvalue()

    def svg(self) -> str:
        """Return the SVG for a page that defines --text, --line, --card and --s1 to --s8."""
        text = self.file[self.file.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        text = re.sub("#[0-9a-f]{6}", lambda m: PALETTE.get(m[0], m[0]), text)
        text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", text)
        label = f'role="img" aria-label="{html.escape(self.title)}"'
        return text.replace("<svg ", f"<svg {label} ", 1)

    def save(self, folder: Path) -> None:
        """Write NAME.svg, NAME.png and NAME.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        image, numbers = io.BytesIO(), io.StringIO(newline="")
        with mpl.rc_context(STYLE):
            self.figure.savefig(image, format="png", dpi=150)
        writer = csv.writer(numbers)
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        (folder / f"{self.name}.svg").write_text(self.file, encoding="utf-8")
        (folder / f"{self.name}.png").write_bytes(image.getvalue())
        (folder / f"{self.name}.csv").write_text(numbers.getvalue(), encoding="utf-8", newline="")
