"""The settings of a federation and of its sites, as far as they have to go together.

Imports nothing heavy: what is wrong is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedex_scale.config.federation import PartitionConfig
from fedex_scale.config.load import Source, load_config
from fedex_scale.config.section import replace as changed
from fedex_scale.config.settings import Config
from fedex_scale.config.yamlfile import read_yaml
from fedex_scale.runtime.errors import UserError
from fedex_scale.sites.sent import Sent, read_sent

NO_DATA = {"path": "at the sites"}

Overrides = Sequence[str] | Mapping[str, Any] | None


def load_site(source: Source, overrides: Overrides, server_dir: Path) -> tuple[Config, Sent, str]:
    """Return a site's settings, what it was sent, and the SHA-256 that this is known by.

    Raises:
        UserError: settings that cannot be, or do not go with the server's; no state of a server.
    """
    config = load_config(source, overrides)
    sent, start = read_sent(server_dir)
    if problems := "; ".join(_other_settings(config, sent)):
        raise UserError(problems)
    section = changed(config.federation, init=sent.init)
    alone = PartitionConfig(kind="contiguous", num_clients=1)
    fixed = {"fixed_examples": (), "max_examples": None, "min_clients": 1}
    section = changed(section, **fixed)
    return changed(config, federation=section, partition=alone), sent, start


def _other_settings(config: Config, sent: Sent) -> Iterator[str]:
    """Yield what of a site's settings does not go with the server's."""
    if config.task.has_head:
        yield f"task.kind: a head is trained in a simulation only, got {config.task.kind}"
    if config.method.name != sent.method:
        yield f"method.name: expected {sent.method}, as the server, got {config.method.name}"
    if config.lora.use_rslora != sent.use_rslora:
        yield f"lora.use_rslora: expected {sent.use_rslora}, as the server"
    if config.lora.rank > sent.rank:
        yield (
            f"lora.rank: expected at most {sent.rank}, the server's, got {config.lora.rank}; a "
            "site may have a lower one of its own"
        )
    number = config.site.number
    if number is None:
        yield "site.number: missing; add this site's number, from 0, which no other site has"
    elif number >= sent.clients:
        yield f"site.number: expected a number below {sent.clients}, the sites' count, got {number}"


def load_federation(source: Source, overrides: Overrides) -> Config:
    """Return a federation's settings, if they can work over sites."""
    if isinstance(source, (str, Path)) and Path(source).suffix:
        tree = read_yaml(Path(source))
        if isinstance(tree, dict):
            source = {"data": NO_DATA, **tree}
    config = load_config(source, overrides)
    if config.aggregate.fold != "side":
        raise UserError(
            f"aggregate.fold: expected side, got {config.aggregate.fold}, which changes the base: "
            "sites that missed a round could not go on; use side"
        )
    if config.method.name in ("centralized", "full"):
        what = {"centralized": "one client with all data", "full": "no adapter to send"}
        raise UserError(
            f"method.name: {config.method.name} has {what[config.method.name]}; choose another"
        )
    if config.task.has_head:
        raise UserError(
            f"task.kind: a head is trained in a simulation only, got {config.task.kind}; choose "
            "instruct or generate"
        )
    if config.federation.client_fraction < 1:
        raise UserError(
            "federation.client_fraction: expected 1, as sites take part as they can; leave it out"
        )
    if config.federation.min_clients > config.partition.num_clients:
        raise UserError(
            f"federation.min_clients: expected at most {config.partition.num_clients}, the number "
            f"of sites (partition.num_clients), got {config.federation.min_clients}"
        )
    return config
