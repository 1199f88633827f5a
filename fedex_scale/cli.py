"""The command line: wiring only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import fedex_scale
from fedex_scale import api
from fedex_scale.afterwards import commands
from fedex_scale.runtime import process
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.text import one_line, readable
from fedex_scale.sites import commands as sites

Config = Annotated[
    str,
    typer.Option(
        "--config", "-c", help="The run's YAML, or a recipe that comes along, such as quickstart."
    ),
]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"fedex-scale {fedex_scale.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Federated LoRA fine-tuning of large language models with exact aggregation."""


@app.command()
def run(
    config: Config,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint; start, if none.")
    ] = False,
    profile: Annotated[
        str | None, typer.Option(help="Trace these steps, such as 3,4, with torch's profiler.")
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,
) -> None:
    """Train the clients round by round, aggregate, score and export."""
    asked = ["run.resume=auto"] if resume else []
    asked += [f"run.profile_steps=[{profile}]"] if profile else []
    api.run(config, [*(overrides or []), *asked])


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="To read, or copy.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the recipe there, to change it.")
    ] = None,
) -> None:
    """List the recipes that come along; or print one, or copy it."""
    from fedex_scale.config.recipes import copy, recipes, text_of

    if name is None and out is not None:
        raise UserError("recipes: --out copies a recipe; name one before it, such as quickstart")
    if out is not None:
        print(copy(name, out))
    elif name is not None:
        print(text_of(name), end="")
    else:
        for recipe in recipes():
            print(f"{recipe.name}\n    {recipe.purpose}\n    {recipe.hardware}")


@app.command("config")
def show_settings(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="With --check: change a value."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="KEY", help="Tell of one key, such as train.packing.")
    ] = None,
    check: Annotated[
        str | None, typer.Option(metavar="FILE", help="Look a run's YAML over; run nothing.")
    ] = None,
) -> None:
    """Print a YAML of all settings with their defaults; or tell of one key, or check a file."""
    from fedex_scale.config import describe
    from fedex_scale.config.load import load_config

    if (overrides and check is None) or (check and explain):
        raise UserError(
            "config: expected --check FILE [section.key=value]..., --explain KEY, or nothing; "
            "leave out the rest"
        )
    if check is not None:
        load_config(check, overrides or [])
        print(
            one_line(
                f"{check}: no mistake in its settings; fedex-scale doctor looks at the machine, "
                "and fedex-scale data at the rows"
            )
        )
    else:
        print(
            describe.explain(explain) if explain else describe.template(), end="\n" * bool(explain)
        )


@app.command("data")
def show_data(
    config: Config,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
    ] = None,
    number: Annotated[int, typer.Option("-n", help="Examples to show.")] = 3,
) -> None:
    """Show what would be trained on: examples as the model sees them, lengths, clients' shares."""
    from rich.console import Console

    console = Console(highlight=False)
    for part in api.preview(config, overrides, number=max(0, number), color=console.is_terminal):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


@app.command()
def aggregate(
    clients: Annotated[
        list[Path], typer.Argument(metavar="CLIENT_DIR...", help="PEFT LoRA adapter directories.")
    ],
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    method: Annotated[str, typer.Option(help="fedex, fedit, ffa, flora, flexlora, lora_fair.")] = (
        "fedex"
    ),
    assign: Annotated[
        str, typer.Option(help="fedex: average, reinit, keep (an adapter a client) or svd.")
    ] = "average",
    svd_rank: Annotated[
        int | None, typer.Option(help="fedex: keep only this rank of the residual.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One a client, such as 0.5,0.3,0.2; none: all alike.")
    ] = None,
    fold: Annotated[
        str, typer.Option(help="Where the residual goes: side (the adapter), or carry, round.")
    ] = "side",
    side_rank: Annotated[
        int | None, typer.Option(help="side: its rank; the rest goes into the base. All, if none.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32: write a changed base so; none: as BASE is.")
    ] = None,
    robust: Annotated[
        str, typer.Option(help="A client unlike most: clip its norm, or leave it out: trimmed.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="For methods that draw a fresh adapter.")] = 0,
) -> None:
    """Aggregate LoRA adapters exactly: any PEFT adapters, no GPU, no model in memory."""
    from rich.console import Console

    from fedex_scale.aggregation.offline import describe, parse_weights

    console = Console(highlight=False)
    report = api.aggregate(
        clients,
        base=base,
        out=out,
        method=method,
        assign=assign,
        svd_rank=svd_rank,
        weights=parse_weights(weights),
        fold=fold,
        side_rank="auto" if side_rank is None else side_rank,
        dtype=dtype,
        robust=robust,
        seed=seed,
        console=console,
    )
    for line in describe(report, out):
        console.print(one_line(line), markup=False, soft_wrap=True)


@app.command()
def plan(
    config: Config,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs, or ranks without; none: as here.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of each, such as 80GB; none: as here.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="Such as 256GB; none: as here.")] = None,
    nvme: Annotated[str | None, typer.Option(help="Such as 1TB; none: engine.nvme_path.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="That training reaches on a GPU; none: 40% of an A100.")
    ] = None,
) -> None:
    """Say what a config needs of a machine, from its sizes alone; exit code 1 if it cannot fit."""
    from rich.console import Console

    made = api.plan(
        config,
        overrides,
        gpus=gpus,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        nvme=nvme,
        tflops=tflops,
    )

    from fedex_scale.planning.plan_table import show

    console = Console(highlight=False, width=120)
    for part in show(made):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    raise typer.Exit(int(not made.chosen.fits))


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="What is to run here, as for run.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
    ] = None,
) -> None:
    """Say what this machine has and lacks; exit code 1 if the config cannot run."""
    from fedex_scale.config.load import load_config

    settings = load_config(config, overrides or []) if config else None

    from fedex_scale.planning.doctor import examine

    failed = False
    for finding in examine(settings):
        failed |= finding.fatal
        print(readable(finding))
    raise typer.Exit(int(failed))


app.command()(commands.export)


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's directory, or a model.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT adapter; none: the run's final/adapter.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Task or group; repeat for more. None: the run's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="The first so many examples of each task; none: all.")
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where local test sets lie; none: FEDEX_SCALE_DATA.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in a stock task's prompt; none: as it has it.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Prompts at once, or auto; none: the run's own, or 16.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; none: the run's own, or what is fast.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory with lm-eval tasks of your own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make for the results.")] = None,
    backend: Annotated[str, typer.Option(help="hf, or vllm: lm-eval's own, for GPUs.")] = "hf",
    python: Annotated[
        str, typer.Option(help="For vllm: Python of an environment that has it.")
    ] = sys.executable,
) -> None:
    """Score a run's final model, or any model, with lm-eval, as the run itself did."""
    from rich.console import Console

    from fedex_scale.runtime import distributed
    from fedex_scale.scoring import post_hoc
    from fedex_scale.scoring.evaluation import warnings

    size = int(batch_size) if batch_size and batch_size.isdecimal() else batch_size
    if size not in (None, "auto") and not isinstance(size, int):
        raise UserError(f"--batch-size: expected a number or auto, got {batch_size}")
    done = api.evaluate(
        model,
        adapter=adapter,
        suite=suite or (),
        limit=limit,
        data_dir=data_dir,
        num_fewshot=num_fewshot,
        batch_size=size,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        include_path=include_path,
        out=out,
        backend=backend,
        python=python,
    )
    if distributed.is_main():
        console = Console(highlight=False)
        console.print(post_hoc.table(done.results, done.known_as))
        for warning in warnings(done.results):
            console.print(one_line(f"warning: {warning}"), markup=False, soft_wrap=True)
        console.print(one_line(f"results: {done.out}"), markup=False, soft_wrap=True)


app.command()(commands.chat)
app.command()(commands.push)
app.command()(commands.compare)
app.command()(commands.report)


sites.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    process.main(app, arguments)


if __name__ == "__main__":
    main()
