"""`fedex-scale report`: one self-contained page about one run, or several side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedex_scale.files.run_dir import RunDir
from fedex_scale.reporting import (
    card,
    costs,
    deviations,
    losses,
    record,
    settings,
    tables,
    training,
    words,
)
from fedex_scale.reporting.chart import Chart, Record
from fedex_scale.runtime.outputs import adding, write_file
from fedex_scale.runtime.text import readable

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
    records = _named_apart([_readable(record.gather(RunDir(run))) for run in runs])
    with adding(out) as scratch:
        sections = _sections(records, scratch / FIGURES)
        write_file(scratch / PAGE, _render(records, sections))
    return out / PAGE


def _render(records: Sequence[Record], sections: Sequence[dict[str, Any]]) -> str:
    single = len(records) == 1
    names = ", ".join(run["name"] for run in records)
    title = names if single else f"{len(records)} runs compared"
    loader = PackageLoader("fedex_scale", "reporting")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template("page.html.j2").render(
        title=title,
        subtitle=settings.in_one_line(records[0]) if single else names,
        notes=[note for run in records for note in tables.notes(run, name=not single)],
        tiles=tables.tiles(records[0]) if single else [],
        sections=sections,
        many=len(records) > 2,
    )


def _sections(records: Sequence[Record], folder: Path) -> list[dict[str, Any]]:
    """Return the page's sections that have something to show; their figures are saved, too."""
    groups = _groups(records, folder)
    configs = [
        {"title": f"Whole config of {run['name']}", "text": settings.yaml_of(run)}
        for run in records
    ]
    prompts = {run["name"]: card.prompt_of(run) for run in records}
    if any(prompts.values()):
        same = len(set(prompts.values())) == 1
        for name, prompt in list(prompts.items())[: 1 if same else None]:
            title = "The prompt as trained" + ("" if same else f", {name}")
            configs.insert(0, {"title": title, "text": prompt})
    sections = []
    for name, title, text in tables.SECTIONS:
        shown = [group for group in groups[name] if group["figures"] or group["tables"]]
        details = configs if name == "run" else []
        samples = tables.samples(records) if name == "samples" else []
        if shown or samples:
            about = {"id": name, "title": title, "text": text, "samples": samples}
            sections.append({**about, "groups": shown, "details": details})
    return sections


def _groups(records: Sequence[Record], folder: Path) -> dict[str, list[Group]]:
    """Return each section's groups of figures and tables.

    One run's figures are one group; of several runs, those of one kind stand beside each other.
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

    def of_all(chart: Chart | None, beside: list[words.Table]) -> Group:
        return {"figures": figures((chart, None)), "tables": beside}

    def of_each(*draws: Draw, beside: Sequence[words.Table] = ()) -> list[Group]:
        rows = [figures(*((draw(run, records), run) for run in records)) for draw in draws]
        rows = rows if several else [[figure for row in rows for figure in row]]
        last = len(rows) - 1
        return [{"figures": x, "tables": beside if i == last else []} for i, x in enumerate(rows)]

    alike = all(run["communication"] == records[0]["communication"] for run in records)
    sending = records[:1] if alike else records
    traffic = figures(*((costs.traffic(run), None if alike else run) for run in sending))
    compared = deviations.compared(records) if several else None
    overlaid = [losses.losses_compared(records)] if several else []
    one_rate = several and len({losses.rates(run) for run in records}) == 1
    if one_rate:
        overlaid.append(losses.learning_rate(records[0]))
    curves = [losses.loss] if one_rate else [losses.loss, losses.learning_rate]
    quotients = tables.observed(records)
    measured = (deviations.by_depth, deviations.over_rounds, deviations.spectrum)
    return {
        "glance": [of_all(None, tables.glance(records))],
        "scores": [of_all(training.scores(records), tables.scores(records))],
        "samples": [],
        "loss": [
            {"figures": figures(*((chart, None) for chart in overlaid)), "tables": []},
            *of_each(*curves, beside=[*tables.held_out(records), *tables.clients(records)]),
        ],
        "deviation": [
            of_all(compared, [*(quotients if several else []), *tables.deviation(records)]),
            *of_each(*measured, beside=[] if several else quotients),
        ],
        "kept": [of_all(deviations.kept(records), tables.kept(records))],
        "communication": [{"figures": traffic, "tables": tables.communication(sending)}],
        "time": of_each(costs.seconds_by_phase, costs.memory_by_phase),
        "run": [of_all(None, [settings.facts(records), *settings.data(records)])],
    }


def _readable(node: Any) -> Any:
    """Return a record whose text is text: of a run that anyone may have made."""
    if isinstance(node, str):
        return readable(node, most=100_000)
    if isinstance(node, dict):
        return {_readable(key): _readable(value) for key, value in node.items()}
    return [_readable(value) for value in node] if isinstance(node, list | tuple) else node


def _named_apart(records: Sequence[Record]) -> list[Record]:
    """Give runs of the same name a number, and every run a name that a file can have."""
    taken: dict[str, int] = {}
    named = []
    for run in records:
        name = re.sub(r"[^\w.-]+", "-", run["name"])[:100]
        taken[name] = taken.get(name, 0) + 1
        named.append(run | {"name": name if taken[name] == 1 else f"{name} ({taken[name]})"})
    return named
