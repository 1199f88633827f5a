"""The commands of a federation of real sites: wiring only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Option(help="This site's YAML.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Change a value.")
]

federate = typer.Typer(no_args_is_help=True, help="Set up a federation over Flower.")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(client_round)
    app.command()(server_round)
    app.add_typer(federate, name="federate")


def client_round(
    config: Config,
    server: Annotated[Path, typer.Option(metavar="DIR", help="What the server sent.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="To make: what goes to the server.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = True,  # it always does
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

    server_round(run, config, overrides, say=print)


@federate.command("init")
def init_app(
    app: Annotated[Path, typer.Argument(metavar="APP", help="Directory to make, for `flwr run`.")],
    config: Annotated[str, typer.Option(metavar="FILE", help="The federation's YAML.")],
    run: Annotated[Path, typer.Option(help="Where the server keeps the federation.")],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of the SuperLink.")],
    certificate: Annotated[
        Path, typer.Option(metavar="PEM", help="Of the authority that signed the SuperLink's.")
    ],
    command: Annotated[
        str, typer.Option(help="How fedex-scale starts at the server.")
    ] = "fedex-scale",
    deadline: Annotated[int, typer.Option(min=1, help="Seconds that a round may take.")] = 86400,
) -> None:
    """Write the app that Flower runs, with its settings."""
    from fedex_scale.sites.app_directory import write_app
    from fedex_scale.sites.settings import load_federation

    write_app(
        app,
        load_federation(config, ()),
        Path(config),
        run=run,
        address=address,
        certificate=certificate,
        command=command,
        deadline_s=deadline,
    )
    print(f"{app}: FLWR_HOME={app}/.flwr flwr run {app} --stream")


@federate.command("keys")
def make_keys(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make.")],
    sites: Annotated[int, typer.Option(min=0, help="How many sites to make a key pair for.")],
    host: Annotated[
        list[str], typer.Option(help="Name or address of the server; repeat for more.")
    ],
) -> None:
    """Make an authority, the server's certificate, and a key pair for every site."""
    from fedex_scale.sites.app_directory import write_keys

    write_keys(out, host, sites)
    print(f"{out}: ca.pem is for every site, ca.key for nobody")
