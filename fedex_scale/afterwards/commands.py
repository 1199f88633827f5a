"""Commands for a run that is there, as `cli.py` takes them; nothing heavy before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedex_scale.afterwards.finished import finished
from fedex_scale.runtime.text import one_line
from fedex_scale.runtime.waiting import waiting


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    before: Annotated[
        bool, typer.Option("--before", help="Begin with the model from before training.")
    ] = False,
    prompt: Annotated[
        str,
        typer.Option(help="Around a question: trained, chat, none; auto: what it was trained on."),
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token each time.")
    ] = 0.0,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; none: the run's own.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
    ] = False,
) -> None:
    """Talk to a run's model, before and after training; in a pipe, a question a line."""
    there = finished(run)
    with waiting("loading the model"):
        from fedex_scale.afterwards.chat import Talker
        from fedex_scale.afterwards.dialogue import converse

        talker = Talker(
            there,
            form=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    converse(talker, "before" if before else "after")


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    hub_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Made if it is not there.")],
    base: Annotated[
        str | None, typer.Option(help="The base's hub id, where the run had a local directory.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For your eyes only.")] = False,
) -> None:
    """Upload a run's adapter, model card and report to the Hugging Face hub."""
    there = finished(run)
    with waiting("uploading"):
        from fedex_scale.afterwards import hub

        address = hub.push(there, hub_id, base=base, private=private)
    print(address)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    rank: Annotated[
        int | None, typer.Option(help="Compress the adapter to this rank; exact, if none.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write a whole model.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of a merged model: float32 or bfloat16; none: the base's.")
    ] = None,
) -> None:
    """Turn a run into one exact adapter for the untouched base, or into a merged model."""
    from fedex_scale.federation.export import export_run

    done = export_run(run, out, rank=rank, merged=merged, dtype=dtype)
    what = "merged model" if merged else f"adapter of rank {done.rank} for the untouched base"
    line = f"{out}: {what}, {done.rounds} rounds, relative error {done.error:.2e}"
    if merged and dtype != "float32" and done.error > 0.01:
        line += ", as the base's numbers round what was trained; --dtype float32 keeps it"
    print(one_line(line))


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_OR_RESULTS...", help="The first is what others differ from."),
    ],
) -> None:
    """Compare scored runs on the same examples: differences with bootstrap intervals."""
    from rich.console import Console

    from fedex_scale.scoring import compare as comparison

    console = Console(highlight=False)
    console.print(comparison.table(comparison.compare(runs)), soft_wrap=True)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory; none: the run's own, or comparison.")
    ] = None,
) -> None:
    """Write report.html about a run, or about several side by side, with its figures."""
    from fedex_scale.reporting.page import write_report

    page = write_report(runs, out or (runs[0] if len(runs) == 1 else Path("comparison")))
    print(one_line(page))
