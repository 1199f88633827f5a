"""A base and its server, rounds from clients' adapters on disk, and what they should add up to."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from layer_oracles import WEIGHTS, dense, product
from tiny import near, random_pairs, save_adapter

from fedex_scale.aggregation.aggregator import AggregateReport, Round, Sinks, aggregate
from fedex_scale.aggregation.ranks import base_update_rank
from fedex_scale.aggregation.weights import Target
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import LowRank, Pair, stack

SHAPES = {"model.layers.0.q_proj": (23, 17), "model.layers.0.down_proj": (150, 29)}
RANK, SCALING = 4, 0.5
BF16, FLOAT32 = torch.bfloat16, torch.float32
FOLDS = ("side", "carry", "round")


def start() -> dict[str, Pair]:
    """Return the server's pair before the first round."""
    return random_pairs(SHAPES, rank=RANK, seed=0)


def run_round(
    server: Server,
    tmp_path: Path,
    clients: Sequence[Path],
    *,
    previous: Mapping[str, Pair],
    weights: Sequence[float] = WEIGHTS,
    method: MethodConfig | str = "fedex",
    fold: str = "side",
    side_rank: int | None = None,
    side_dtype: torch.dtype = FLOAT32,
) -> AggregateReport:
    """Aggregate, and let the server hold the results."""
    method = MethodConfig(name=method) if isinstance(method, str) else method
    section = AggregateSection(fold=fold, side_rank="auto" if side_rank is None else side_rank)
    if side_rank is None:
        side_rank = base_update_rank(method, len(clients), RANK)
    with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
        before = save_adapter(Path(scratch) / "previous", previous, alpha=SCALING * RANK)
        task = Round(
            clients=[Adapter(path) for path in clients],
            weights=weights,
            previous=Adapter(before),
            rank=RANK,
            scaling=SCALING,
            side_rank=side_rank,
        )
        sinks = Sinks(
            adapter=server.pairs.__setitem__,
            residual=lambda layer, pieces: server.residuals.update({layer: list(pieces)}),
            side=server.see,
        )
        return aggregate(task, method, section, server.targets, sinks, seed=hash_of)


def hash_of(layer: str) -> int:
    return sum(layer.encode())


def make_clients(
    tmp_path: Path,
    previous: Mapping[str, Pair],
    *,
    spread: float = 0.3,
    num_clients: int = 3,
    sharing_A: bool = False,
) -> tuple[list[Path], dict[str, list[torch.Tensor]]]:
    """Write clients near the previous pair; return them, and what each adds to each layer."""
    paths, updates = [], {layer: [] for layer in SHAPES}
    for k in range(num_clients):
        pairs = near(previous, spread=spread, seed=k + 1)
        if sharing_A:
            pairs = {layer: Pair(previous[layer].A_RI, pair.B_OR) for layer, pair in pairs.items()}
        path = Path(tempfile.mkdtemp(dir=tmp_path)) / f"client-{k:04d}"
        paths.append(save_adapter(path, pairs, alpha=SCALING * RANK))
        for layer, pair in pairs.items():
            updates[layer].append(product(pair, SCALING))
    return paths, updates


def mean(updates: Sequence[torch.Tensor], weights: Sequence[float] = WEIGHTS) -> torch.Tensor:
    return sum(weight * update for weight, update in zip(weights, updates, strict=True))


def assert_exact(server: Server, before: Mapping, ideal: Mapping, tolerance: float = 1e-6) -> None:
    for layer in SHAPES:
        error = server.applied(layer) - before[layer] - ideal[layer]
        assert error.norm() <= tolerance * ideal[layer].norm(), layer


@dataclass
class Server:
    """The base and what rounds have made of it; each layer's weight as it is stored."""

    dtype: torch.dtype = FLOAT32
    transposed: bool = False
    pairs: dict[str, Pair] = field(default_factory=dict)
    sides: dict[str, LowRank] = field(default_factory=dict)
    residuals: dict[str, list[LowRank]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(99)
        self.weights, self.targets = {}, {}
        for layer, shape in SHAPES.items():
            W_OI = torch.randn(shape, generator=draw).to(self.dtype)
            W = W_OI.T.contiguous() if self.transposed else W_OI
            self.weights[layer] = W
            self.targets[layer] = Target(
                flat=W.view(-1), shape=tuple(W.shape), transposed=self.transposed
            )

    def base(self, layer: str, *, with_carry: bool = True) -> torch.Tensor:
        """Return a layer's weight as (O, I), float64."""
        W, carry = self.weights[layer].double(), self.targets[layer].carry
        if with_carry and carry is not None:
            W = W + carry.view_as(W)
        return W.T if self.transposed else W

    def see(self, layer: str, part: LowRank) -> None:
        old = [self.sides[layer]] if layer in self.sides else []
        self.sides[layer] = stack(*old, part)

    def applied(self, layer: str) -> torch.Tensor:
        """Return what the model multiplies with, as (O, I), float64."""
        side = dense([self.sides[layer]]) if layer in self.sides else 0
        return self.base(layer) + side + product(self.pairs[layer], SCALING)
