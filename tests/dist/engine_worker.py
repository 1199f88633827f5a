"""One rank of a real engine: train clients, fold, and write down what happened.

    torchrun --nproc-per-node 2 engine_worker.py MODEL DEEPSPEED_JSON|none CLIENTS OUT

CLIENTS is a comma-separated list, trained in this order; OUT takes a file for each rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fedex_scale.runtime import distributed
from fedex_scale.engine import head
from fedex_scale.config.learning import LoraSection
from fedex_scale.methods.algebra import LowRank, Pair
from fedex_scale.federation.client import train_client
from fedex_scale.config.learning import TrainSection
from fedex_scale.data.batching import Examples
from fedex_scale.tasks.instruct import Tokens
from fedex_scale.engine.build import Engine, build_engine
from fedex_scale.engine.parameters import Source
from fedex_scale.engine.training import moments_away
from fedex_scale.engine.contents import fold_targets, read_base_weight, read_pairs, set_adapter, set_side
from fedex_scale.config.learning import EngineSection
from fedex_scale.methods.interface import fresh_pair
from fedex_scale.config.learning import ModelSection
from fedex_scale.aggregation.weights import Target, fold

RANK, SIDE_RANK = 4, 6
COLLECTIVES = (
    "all_reduce all_gather all_gather_into_tensor all_gather_single broadcast reduce "
    "reduce_scatter reduce_scatter_tensor reduce_scatter_single all_to_all all_to_all_single "
    "gather scatter send recv isend irecv"
).split()


def main(model: str, deepspeed: str, clients: str, out: str) -> None:
    chosen = None if deepspeed == "none" else deepspeed
    head.PIECE = 4 * 400  # several pieces of logits in each step
    distributed.join_group(required=chosen is not None)
    engine = build_engine(
        ModelSection(path=model, dtype="float32"),
        LoraSection(rank=RANK, alpha=8, dropout=0.2),
        EngineSection(deepspeed=chosen, nvme_path=str(Path(out) / "nvme")),
        trains=frozenset("AB"),
        side_rank=SIDE_RANK,
        optimizer="adamw",
        micro_batch_size=2,
        accumulation=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    start = random_pairs(engine, RANK, seed=1)
    results = {"world_size": distributed.world_size()}
    results["clients"] = [train(engine, start, int(client)) for client in clients.split(",")]
    set_adapter(engine, given(start), side=False)
    results["round_trip"] = all(
        torch.equal(a, b)
        for name, pair in read_pairs(engine)
        for a, b in zip(pair, start[name], strict=True)
    )
    results["fold"] = check_fold(engine)
    results |= check_side(engine, start)
    torch.save(results, Path(out) / f"rank{distributed.rank()}.pt")
    distributed.leave(0)


def random_pairs(engine: Engine, rank: int, *, seed: int) -> dict[str, Pair]:
    """Return random factors of every layer, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (num_out, num_in) in engine.shapes().items():
        like = Pair(torch.empty(rank, num_in), torch.empty(num_out, rank))
        A_RI = fresh_pair(like, generator).A_RI
        pairs[name] = Pair(A_RI, torch.randn(num_out, rank, generator=generator) * 0.02)
    return pairs


def given(pairs: dict[str, Pair]) -> Source:
    return lambda layer: pairs[layer]


def train(engine: Engine, start: dict[str, Pair], client: int) -> dict:
    """Train one client on random tokens and return its losses and adapter."""
    generator = torch.Generator().manual_seed(100 + client)
    lengths = torch.randint(5, 15, (11,), generator=generator).numpy()
    examples = Examples(
        tokens=torch.randint(5, 300, (int(lengths.sum()),), generator=generator).int().numpy(),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
        prompt_lengths=lengths // 2,
        rows=torch.arange(11).numpy(),
    )
    losses: list[float] = []
    train_client(
        engine,
        Tokens(examples, pad_id=2),
        given(start),
        TrainSection(batch_size=8, micro_batch_size=2, local_epochs=2, weight_decay=0.01),
        seed=0,
        round=1,
        client=client,
        side=False,
        on_step=lambda fields: losses.append(fields["loss"]),
    )
    with moments_away(engine):  # as while a model is scored
        pairs = dict(read_pairs(engine))
    return {"losses": losses, "pairs": pairs}


def check_fold(engine: Engine) -> dict:
    """Fold into every layer where it lies, and beside that into whole copies of the weights."""
    pairs = random_pairs(engine, 8, seed=2)
    before = {name: read_base_weight(engine, name).clone() for name in engine.layers}
    targets = fold_targets(engine)
    calls = count_collectives()
    for name, target in targets.items():
        fold(target, [LowRank(pairs[name].B_OR, pairs[name].A_RI)], carry=True)
    num_calls = len(calls)
    equal, moved, sharded = True, True, False
    for name, whole in before.items():
        expected = whole.clone()
        alone = Target(
            flat=expected.view(-1), shape=tuple(whole.shape), transposed=targets[name].transposed
        )
        fold(alone, [LowRank(pairs[name].B_OR, pairs[name].A_RI)], carry=True)
        after = read_base_weight(engine, name)
        equal &= torch.equal(after, expected)
        moved &= not torch.equal(after, whole)
        sharded |= not targets[name].is_whole
    return {"equal": equal, "moved": moved, "sharded": sharded, "collectives": num_calls}


def check_side(engine: Engine, start: dict[str, Pair]) -> dict:
    """Undo what `check_fold` folded: most of it in the side adapter, the rest in the base.

    Then undo all of it in the base, and compare the logits.
    """
    folded = random_pairs(engine, 8, seed=2)
    side = {n: Pair(-p.A_RI[:SIDE_RANK], p.B_OR[:, :SIDE_RANK]) for n, p in folded.items()}
    rest = {n: LowRank(-p.B_OR[:, SIDE_RANK:], p.A_RI[SIDE_RANK:]) for n, p in folded.items()}
    set_adapter(engine, given(start), side=False)
    shifted = logits(engine)
    set_side(engine, given(side))
    fold_all(engine, rest)
    set_adapter(engine, given(start), side=True)
    by_side = logits(engine)
    fold_all(engine, {n: LowRank(pair.B_OR, pair.A_RI) for n, pair in side.items()})
    set_adapter(engine, given(start), side=False)
    by_base = logits(engine)
    return {
        "shift": float((shifted - by_base).norm() / by_base.norm()),
        "side_error": float((by_side - by_base).norm() / by_base.norm()),
    }


@torch.no_grad()
def logits(engine: Engine) -> torch.Tensor:
    engine.model.eval()
    return engine.model(input_ids=torch.arange(5, 25)[None].to(engine.device)).logits


def fold_all(engine: Engine, updates: dict[str, LowRank]) -> None:
    for name, target in fold_targets(engine).items():
        fold(target, [updates[name]], carry=True)


def count_collectives() -> list[str]:
    """Make torch.distributed's collectives note their calls from now on."""
    calls: list[str] = []
    for name in COLLECTIVES:
        real = getattr(dist, name, None)
        if real is not None:
            setattr(dist, name, lambda *a, n=name, f=real, **k: (calls.append(n), f(*a, **k))[1])
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
