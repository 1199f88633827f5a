"""The commands for a finished run, as `cli.py` takes them; nothing heavy before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedex_scale.afterwards.finished import finished
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
