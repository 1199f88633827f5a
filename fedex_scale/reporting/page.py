"""`fedex-scale report`: one self-contained page about one run, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedex_scale import record
from fedex_scale.errors import UserError
from fedex_scale.reporting import costs, deviations, tables, training
from fedex_scale.reporting.chart import Chart, Record
from fedex_scale.state import RunDir

PAGE, FIGURES = "report.html", "plots"


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write OUT/report.html, and every figure with its numbers under OUT/plots.

    Args:
        runs: run directories, finished or not.

    Returns:
        The page's path.

    Raises:
        UserError: a directory that is no run, or a file in one that cannot be read.
    """
    records = _named_apart([record.gather(RunDir(run)) for run in runs])
    try:
        out.mkdir(parents=True, exist_ok=True)
        sections = _sections(records, out / FIGURES)
        (out / PAGE).write_text(_render(records, sections), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: cannot write to {out} ({error.strerror}); choose another directory"
        ) from None
    return out / PAGE


def _render(records: Sequence[Record], sections: Sequence[dict[str, Any]]) -> str:
    single = len(records) == 1
    names = ", ".join(run["name"] for run in records)
    title = names if single else f"{len(records)} runs compared"
    loader = PackageLoader("fedex_scale", "reporting")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template("page.html.j2").render(
        title=title,
        subtitle=tables.in_one_line(records[0]) if single else names,
        notes=[note for run in records for note in tables.notes(run, name=not single)],
        tiles=tables.tiles(records[0]) if single else [],
        sections=sections,
    )


def _sections(records: Sequence[Record], folder: Path) -> list[dict[str, Any]]:
    """Return the page's sections that have something to show; their figures are saved, too."""
    each = [
        ("loss", training.loss),
        ("deviation", deviations.by_depth),
        ("deviation", deviations.over_rounds),
        ("deviation", deviations.spectrum),
        ("communication", costs.traffic),
        ("time", costs.seconds_by_phase),
        ("time", costs.memory_by_phase),
    ]
    sections = {
        name: {"id": name, "title": title, "text": text, "figures": [], "tables": [], "details": []}
        for name, title, text in tables.SECTIONS
    }

    def show(name: str, chart: Chart | None, run: Record | None = None) -> None:
        if chart is not None:
            chart.save(folder)
            whose = f"{run['name']}: " if run is not None and len(records) > 1 else ""
            figure = {"title": whose + chart.title, "caption": chart.caption, "svg": chart.svg()}
            sections[name]["figures"].append(figure)

    show("scores", training.scores(records))
    if len(records) > 1:
        show("deviation", deviations.compared(records))
    show("kept", deviations.kept(records))
    for name, draw in each:
        for run in records:
            show(name, draw(run), run)
    sections["scores"]["tables"] = tables.scores(records)
    sections["kept"]["tables"] = tables.kept(records)
    for name, make in (("deviation", tables.deviation), ("communication", tables.communication)):
        sections[name]["tables"] = [table for run in records for table in make(run, records)]
    sections["run"]["tables"] = [tables.facts(records), *tables.data(records)]
    sections["run"]["details"] = [
        {"title": f"Whole config of {run['name']}", "text": tables.yaml_of(run)} for run in records
    ]
    return [x for x in sections.values() if x["figures"] or x["tables"]]


def _named_apart(records: Sequence[Record]) -> list[Record]:
    """Give runs of the same name a number, and every run a name that a file can have."""
    taken: dict[str, int] = {}
    named = []
    for run in records:
        name = re.sub(r"[^\w.-]+", "-", run["name"])
        taken[name] = taken.get(name, 0) + 1
        named.append(run | {"name": name if taken[name] == 1 else f"{name} ({taken[name]})"})
    return named
