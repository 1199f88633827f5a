"""Eight rounds of given clients on a real engine; started once a rank by test_rounds_on_ranks.py.

rounds_worker.py MODEL OUT OVERRIDE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from many_rounds import drifting, rounds_of

from fedex_scale.runtime import distributed
from fedex_scale.federation.final import show_handed_over, write_final

NUM_ROUNDS = 8


def main(model: str, out: str, *overrides: str) -> None:
    distributed.join_group(required=any("deepspeed" in word for word in overrides))
    results = {
        fold: run(Path(model), Path(out) / fold, f"aggregate.fold={fold}", *overrides)
        for fold in ("side", "planes")
    }
    torch.save(results, Path(out) / f"rank{distributed.rank()}.pt")
    distributed.leave(0)


def run(model: Path, out: Path, *overrides: str) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    rounds = rounds_of(model, out, *overrides, rounds=NUM_ROUNDS)
    shares = [
        rounds.advance(drifting(rounds, "per_client", number))[1]
        for number in range(1, NUM_ROUNDS + 1)
    ]
    engine = rounds.engine
    seen = rounds.weights()
    show_handed_over(engine, rounds.run, rounds.state)
    write_final(rounds.config, engine, rounds.run, rounds.state)
    return {"shares": shares, "seen": seen, "scored": logits(engine)}


@torch.no_grad()
def logits(engine) -> torch.Tensor:
    engine.model.eval()
    ids = torch.arange(5, 25)[None].to(engine.device)
    return (engine.deepspeed or engine.model)(input_ids=ids).logits


if __name__ == "__main__":
    main(*sys.argv[1:])
