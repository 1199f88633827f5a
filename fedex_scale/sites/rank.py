"""A site with a rank or alpha of its own, exactly.

A site of rank r trains the first r columns of the server's pair; the others stay frozen, in its
side adapter, so that it starts from just what the server has. Back at the server they are put in
their place again: every client has the server's rank there, and nothing is lost by averaging.

    s B A = s B[:, :r] A[:r] + s B[:, r:] A[r:]
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fedex_scale.config.learning import LoraSection
from fedex_scale.config.settings import Config
from fedex_scale.federation.facts import ModelFacts, open_adapter
from fedex_scale.files.adapter_writers import PartWriter
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import LowRank, Pair, align, stack
from fedex_scale.sites.sent import Sent


def is_servers(lora: LoraSection, sent: Sent) -> bool:
    return (lora.rank, lora.alpha) == (sent.rank, sent.alpha)


def cut(config: Config, facts: ModelFacts, parts: dict[str, Path], *, has_side: bool) -> None:
    """Rewrite what the server sent for this site's rank and alpha, in place."""
    lora, whole = config.lora, {}
    for name in ("adapter", "side") if has_side else ("adapter",):
        whole[name] = parts[name].with_name(f".{name}")
        parts[name].rename(whole[name])
    server = Adapter(whole["adapter"])
    side = Adapter(whole["side"]) if has_side else None
    frozen = any(_rest(server, layer, lora.rank).U_OP.any() for layer in server.layers)
    with open_adapter(facts, parts["adapter"], lora, config.model.path) as writer:
        for layer in facts.layers:
            A_RI, B_OR = server.pair(layer).float()
            first = Pair(A_RI[: lora.rank], B_OR[:, : lora.rank])
            scaling = server.scaling_of(layer)
            writer.write(layer, align(first, scaling, rank=lora.rank, to_scaling=lora.scaling))
    if side is not None or frozen:
        most = server.rank + (side.rank if side else 0)
        with PartWriter(
            parts["side"], facts.layers, max_rank=most, dtype=facts.dtype, base=config.model.path
        ) as part:
            for layer in facts.layers:
                pieces = [LowRank(*reversed(side.pair(layer).float()))] if side else []
                part.write(layer, stack(*pieces, _rest(server, layer, lora.rank)))
    for path in whole.values():
        shutil.rmtree(path)


def whole_pair(client: Adapter, server: Adapter, layer: str) -> Pair:
    """Return a client's pair at the server's rank and scaling, with what it did not train."""
    own, scaling = client.pair(layer).float(), server.scaling_of(layer)
    rank = own.A_RI.shape[0]
    if client.scaling_of(layer) != scaling:
        own = align(own, client.scaling_of(layer), rank=rank, to_scaling=scaling)
    if rank == server.rank_of(layer):
        return own
    before = server.pair(layer).float()
    A_RI = torch.cat([own.A_RI, before.A_RI[rank:]])
    return Pair(A_RI, torch.cat([own.B_OR, before.B_OR[:, rank:]], dim=1))


def _rest(server: Adapter, layer: str, rank: int) -> LowRank:
    A_RI, B_OR = server.pair(layer).float()
    return LowRank(B_OR[:, rank:] * server.scaling_of(layer), A_RI[rank:])
