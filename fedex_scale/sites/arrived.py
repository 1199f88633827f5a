"""What sites send back: looked over, and written anew by the server, or refused by name.

What passed is the server's own file in the run's directory, with a config that the server wrote;
what arrived is not opened again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from fedex_scale.config.settings import Config
from fedex_scale.federation.client import ClientUpdate
from fedex_scale.federation.facts import Facts, open_adapter
from fedex_scale.files.adapters import WEIGHTS_FILE, Adapter
from fedex_scale.files.run_dir import RunDir
from fedex_scale.runtime.errors import UserError, reading
from fedex_scale.sites.rank import whole_pair
from fedex_scale.sites.sent import CLIENT_FILE, LARGEST, Returned, Sent, read_told, start_of

_REMEDY = "leave this site out, or let it send its result again"
_MAX_HEADER_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of all that arrived for a round.

    Fields:
        updates: of the clients that were taken, in the order of their numbers.
        refused: a line for each that was not, by the name of its directory.
    """

    updates: list[ClientUpdate]
    refused: dict[str, str]


def take(
    config: Config,
    facts: Facts,
    run: RunDir,
    sent: Sent,
    arrived: Path,
    say: Callable[[str], None],
) -> Taken:
    """Take what lies in a directory, a directory a site, into the run's clients of the round."""
    server, start = Adapter(run.adapter(sent.round - 1)), start_of(sent)
    shutil.rmtree(run.client(sent.round, 0).parent, ignore_errors=True)
    found: dict[int, tuple[str, ClientUpdate]] = {}
    refused = {}
    for path in sorted(arrived.iterdir()) if arrived.is_dir() else []:
        if path.name.startswith("."):
            continue
        try:
            with reading(path, _REMEDY):
                told = _told(path, sent, start, found)
                _write_anew(config, facts, server, path, run.client(sent.round, told.client))
            found[told.client] = (path.name, told)
        except UserError as problem:
            refused[path.name] = str(problem)
            say(f"refused: {problem}")
    return Taken(updates=[found[k][1] for k in sorted(found)], refused=refused)


def _told(
    path: Path, sent: Sent, start: str, found: Mapping[int, tuple[str, ClientUpdate]]
) -> ClientUpdate:
    """Return what a site tells of its training, if it is for this round and new."""
    told = read_told(Returned, path / CLIENT_FILE, _REMEDY)
    if told.round != sent.round:
        raise UserError(f"{path}: expected round {sent.round}, got {told.round}; {_REMEDY}")
    if told.start != start:
        raise UserError(
            f"{path}: was trained from another state of the server than that of round "
            f"{sent.round}; {_REMEDY}"
        )
    if told.client >= sent.clients:
        raise UserError(
            f"{path}: expected a client below {sent.clients}, got {told.client}; {_REMEDY}"
        )
    if told.client in found:
        raise UserError(
            f"{path}: client {told.client} is {found[told.client][0]} already; give every site a "
            "site.number of its own"
        )
    return ClientUpdate(**{x.name: getattr(told, x.name) for x in fields(ClientUpdate)})


def _write_anew(config: Config, facts: Facts, server: Adapter, path: Path, to: Path) -> None:
    """Write a site's adapter as the server's own file, at the server's rank, if it is sound."""
    shapes = facts.shapes()
    most = 8 * config.lora.rank * sum(map(sum, shapes.values())) + _MAX_HEADER_BYTES
    weights = path / WEIGHTS_FILE
    for file in (path, weights):
        if file.is_symlink():
            raise UserError(f"{file}: expected a file of its own, got a link; {_REMEDY}")
    if weights.is_file() and weights.stat().st_size > most:
        raise UserError(
            f"{weights}: expected at most {most:,} bytes, got {weights.stat().st_size:,}; {_REMEDY}"
        )
    adapter = Adapter(path)
    if adapter.full_weights or adapter.base_copies:
        name = [*adapter.full_weights, *adapter.base_copies][0]
        raise UserError(f"{path}: expected LoRA factors alone, got {name:.100}; {_REMEDY}")
    if set(adapter.layers) != set(shapes):
        layer = min(set(adapter.layers) ^ set(shapes))
        raise UserError(f"{path}: layer {layer:.200} is not in both, the site's and the server's")
    scratch = to.with_name(f".{to.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with open_adapter(facts, scratch, config.lora, config.model.path) as writer:
            for layer, shape in shapes.items():
                _check_layer(adapter, layer, shape, config.lora.rank)
                pair = whole_pair(adapter, server, layer)
                if not all(x.abs().max() <= LARGEST for x in pair):
                    raise UserError(
                        f"{path}, layer {layer}: expected factors within {LARGEST:g}, got NaN, Inf "
                        f"or larger ones; {_REMEDY}"
                    )
                writer.write(layer, pair)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    scratch.rename(to)


def _check_layer(adapter: Adapter, layer: str, shape: tuple[int, int], rank: int) -> None:
    if adapter.shapes(layer) != shape:
        raise UserError(
            f"{adapter.path}, layer {layer}: expected shape {shape}, got {adapter.shapes(layer)}; "
            "was it trained on another base model?"
        )
    if adapter.rank_of(layer) > rank:
        raise UserError(
            f"{adapter.path}, layer {layer}: expected a rank of at most {rank}, got "
            f"{adapter.rank_of(layer)}; lower lora.rank at the site"
        )
    if not all(pair.is_floating_point() for pair in adapter.pair(layer)):
        raise UserError(f"{adapter.path}, layer {layer}: expected floating point; {_REMEDY}")
