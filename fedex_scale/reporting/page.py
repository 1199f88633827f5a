"""`fedex-scale report`: one self-contained page about one run, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedex_scale import record
from fedex_scale.errors import UserError
from fedex_scale.reporting import costs, deviations, tables, training
from fedex_scale.reporting.chart import Chart, Record
from fedex_scale.state import RunDir

Draw = Callable[[Record, Sequence[Record]], Chart | None]
Group = dict[str, list]

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
        many=len(records) > 2,
    )


def _sections(records: Sequence[Record], folder: Path) -> list[dict[str, Any]]:
    """Return the page's sections that have something to show; their figures are saved, too.

    A section has groups of figures and tables. One run's figures are one group; of several runs,
    those of one kind stand beside each other.
    """
    several = len(records) > 1

    def figures(*charts: tuple[Chart | None, Record | None]) -> list[dict[str, str]]:
        shown = []
        for chart, run in charts:
            if chart is not None:
                chart.save(folder)
                title = f"{run['name']}: {chart.title}" if several and run else chart.title
                shown.append({"title": title, "caption": chart.caption, "svg": chart.svg()})
        return shown

    def of_each(*draws: Draw) -> list[Group]:
        rows = [figures(*((draw(run, records), run) for run in records)) for draw in draws]
        rows = rows if several else [[figure for row in rows for figure in row]]
        return [{"figures": row, "tables": []} for row in rows]

    measured = (deviations.by_depth, deviations.over_rounds, deviations.spectrum)
    compared = figures((deviations.compared(records), None)) if several else []
    facts = [tables.facts(records), *tables.data(records)]
    alike = all(run["communication"] == records[0]["communication"] for run in records)
    sending = records[:1] if alike else records
    traffic = figures(*((costs.traffic(run), None if alike else run) for run in sending))
    groups: dict[str, list[Group]] = {
        "glance": [{"figures": [], "tables": tables.glance(records)}],
        "scores": [
            {"figures": figures((training.scores(records), None)), "tables": tables.scores(records)}
        ],
        "loss": _with_tables(of_each(training.loss), tables.clients(records)),
        "deviation": [
            {"figures": compared, "tables": tables.deviation(records)},
            *of_each(*measured),
        ],
        "kept": [
            {"figures": figures((deviations.kept(records), None)), "tables": tables.kept(records)}
        ],
        "communication": [{"figures": traffic, "tables": tables.communication(sending)}],
        "time": of_each(costs.seconds_by_phase, costs.memory_by_phase),
        "run": [{"figures": [], "tables": facts}],
    }
    sections = []
    for name, title, text in tables.SECTIONS:
        shown = [group for group in groups[name] if group["figures"] or group["tables"]]
        if shown:
            sections.append({"id": name, "title": title, "text": text, "groups": shown})
    configs = [
        {"title": f"Whole config of {run['name']}", "text": tables.yaml_of(run)} for run in records
    ]
    return [x | {"details": configs if x["id"] == "run" else []} for x in sections]


def _with_tables(groups: list[Group], extra: list[tables.Table]) -> list[Group]:
    """Put tables beside the last group's figures."""
    last = groups[-1]
    return [*groups[:-1], last | {"tables": last["tables"] + extra}]


def _named_apart(records: Sequence[Record]) -> list[Record]:
    """Give runs of the same name a number, and every run a name that a file can have."""
    taken: dict[str, int] = {}
    named = []
    for run in records:
        name = re.sub(r"[^\w.-]+", "-", run["name"])
        taken[name] = taken.get(name, 0) + 1
        named.append(run | {"name": name if taken[name] == 1 else f"{name} ({taken[name]})"})
    return named
