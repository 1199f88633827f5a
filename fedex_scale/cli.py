"""The command line: wiring only."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedex_scale.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Federated LoRA fine-tuning of large language models with exact aggregation."""


@app.command()
def run(
    config: Annotated[Path, typer.Option(help="The run's YAML, such as launch/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
    ] = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,
) -> None:
    """Train the clients round by round, aggregate, score and export."""
    from fedex_scale.run import run_config

    run_config(config, overrides or [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    _quieten_libraries()
    try:
        app(list(arguments) if arguments is not None else None, standalone_mode=True)
    except UserError as error:
        from fedex_scale import distributed

        if distributed.is_main():
            print(f"error: {error}", file=sys.stderr)
        distributed.leave_group()
        sys.exit(2)


def _quieten_libraries() -> None:
    """Leave the terminal to this program: of the libraries, show errors only."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fedex_scale").setLevel(logging.INFO)
    for name in ("bitsandbytes", "transformers", "DeepSpeed", "lm_eval", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, UserWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


if __name__ == "__main__":
    main()
