"""What a config leaves to the machine that a run begins on: settings that say auto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config
from fedex_scale.federation.resume import AUTO
from fedex_scale.planning.choice import Sizes
from fedex_scale.planning.machine import this_machine
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError


def settled(config: Config, begun: Mapping[str, Any] | None) -> Config:
    """Return the config with numbers instead of auto, on every rank.

    Results depend on them by rounding, so that a run that goes on keeps those it was begun with.

    Args:
        begun: the settings of the run that goes on; None for a new one.
    """
    changes = distributed.on_main(lambda: dict(_settle(config, begun)))
    for section, values in changes.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def _settle(config: Config, begun: Mapping[str, Any] | None) -> Iterator[tuple[str, dict]]:
    for section, key in AUTO:
        if getattr(getattr(config, section), key) != "auto":
            continue
        if begun is not None:
            yield section, {key: begun[section][key]}
        elif key == "side_rank":
            yield section, {key: side_rank_that_fits(config)}
        else:
            yield section, {key: tokens_that_fit(config)}


def tokens_that_fit(config: Config) -> int:
    """Return train.micro_batch_tokens for this machine: at least one example's.

    Raises:
        UserError: what a micro-batch takes cannot be counted.
    """
    return Sizes(config, this_machine()).filled(config).train.micro_batch_tokens


def side_rank_that_fits(config: Config) -> int | Literal["auto"]:
    """Return aggregate.side_rank, halved again and again until this machine has room for it.

    Activations are left aside. It stays as it is where there are several machines, and where all
    of it or nothing fits.
    """
    machine = this_machine()
    if machine.gpus != distributed.world_size():
        return "auto"
    try:
        sizes = Sizes(config, machine)
    except UserError:
        return "auto"  # loading says so
    most = sizes.side.most
    while most >= sizes.side.each > 0:
        trial = replace(config, aggregate=replace(config.aggregate, side_rank=most))
        if Sizes(trial, machine).estimate(trial, with_work=False).fits:
            return most if most < sizes.side.most else "auto"
        most //= 2
    return "auto"
