"""The commands of a federation of real sites: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Option(help="This site's YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(client_round)
    app.command()(server_round)


def client_round(
    config: Config,
    server: Annotated[Path, typer.Option(metavar="DIR", help="What the server sent.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="To make: what goes to the server.")],
    overrides: Overrides = None,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = -1,
) -> None:
    """Train this site's client from the server's state; goes on where it was killed."""
    from fedex_scale.runtime.outputs import check_out
    from fedex_scale.sites.settings import load_site

    load_site(config, overrides, server)  # before what takes seconds to import
    check_out(out)
    from fedex_scale.sites.client_round import client_round

    client_round(config, overrides, server_dir=server, out=out)


def server_round(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The federation's run directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="With --config: change a value."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Begin RUN with these settings.")
    ] = None,
) -> None:
    """Aggregate what arrived from the sites, and write what they are sent next; needs no model."""
    from fedex_scale.sites.settings import load_federation

    if config is not None:  # before what takes seconds to import
        load_federation(config, overrides)
    from fedex_scale.sites.server_round import server_round

    server_round(run, config, overrides, say=typer.echo)
