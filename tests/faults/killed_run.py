"""A run that kills itself, as kill -9 would, when it comes to a given moment.

    python killed_run.py KIND COUNT RANK ARGUMENTS...       (any launcher; `none 0 0`: no kill)

The process of rank RANK dies at the COUNT-th call of what KIND names; the arguments are those of
`fedex-scale run`. With KIND `count` it lives, and writes how often each kind was called to COUNT.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

MOMENTS = {
    "train": ["fedex_scale.federation.client.train_step"],
    "fold": [
        "fedex_scale.aggregation.aggregator.fold",
        "fedex_scale.aggregation.aggregator._read_layer",
    ],
    "write": ["fedex_scale.files.tensorfile._write_all"],
    "checkpoint": [
        "fedex_scale.federation.checkpoint.entry_of",
        "fedex_scale.federation.checkpoint.sync",
        "fedex_scale.federation.checkpoint.prune",
        "fedex_scale.federation.saves.write_snapshot",
    ],
    "evaluate": ["lm_eval.models.huggingface.HFLM._model_generate"],
}
CALLS: Counter[str] = Counter()


def main(kind: str, count: str, rank: str, *arguments: str) -> None:
    from fedex_scale import cli
    from fedex_scale.runtime import distributed, process

    process.set_up_libraries()
    is_victim = os.environ.get("RANK", "0") == rank
    if kind == "count":
        watch(tuple(MOMENTS), lambda kind: None)
        distributed.leave = partial(leave, distributed.leave, Path(count) if is_victim else None)
    elif is_victim and kind != "none":
        watch((kind,), lambda kind: die() if CALLS[kind] == int(count) else None)
    cli.main(["run", *arguments])


def leave(real, counts: Path | None, code: int) -> None:
    """Write the counts down, and leave."""
    if counts is not None:
        counts.write_text(json.dumps(CALLS))
    real(code)


def watch(kinds: Sequence[str], at_call) -> None:
    """Call `at_call` with the kind, before each call of one of its functions."""
    import fedex_scale.run  # noqa: F401  everything that is patched, and what it uses

    for kind in kinds:
        if kind == "evaluate":
            import lm_eval.models.huggingface  # noqa: F401
        for name in MOMENTS[kind]:
            owner, _, attribute = name.rpartition(".")
            module = sys.modules.get(owner)
            if module is None:
                module = getattr(sys.modules[owner.rpartition(".")[0]], owner.rpartition(".")[2])
            real = getattr(module, attribute)

            def called(*args, real=real, kind=kind, **options):
                CALLS[kind] += 1
                at_call(kind)
                return real(*args, **options)

            setattr(module, attribute, called)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
