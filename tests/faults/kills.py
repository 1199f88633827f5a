"""Kill a run at seeded moments, let it go on, and compare the end with that of a run left alone.

    PYTHONPATH=.:tests python tests/faults/kills.py CONFIG KILLS SEED RANKS [section.key=value ...]

prints a line of JSON for each kill. With RANKS 0 the runs are plain processes, forked from one
that has imported everything; otherwise torchrun starts so many, and one of them is killed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import killed_run
import yaml
from resuming import differing

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What became of one kill."""

    kind: str
    count: int
    of: int
    rank: int
    killed: bool
    orphans: int
    went_on: str
    same: bool


def main(config: str, kills: str, seed: str, ranks: str, *overrides: str) -> None:
    for kill in kill_and_resume(Path(config), int(kills), int(seed), int(ranks), overrides):
        print(json.dumps(asdict(kill)), flush=True)


def kill_and_resume(
    config: Path, kills: int, seed: int, ranks: int, overrides: tuple[str, ...]
) -> Iterator[Kill]:
    """Yield what became of each kill; the moments are drawn from all that there are."""
    runs = Path(yaml.safe_load(config.read_text())["run"]["dir"])
    arguments = ("--config", str(config), *overrides)
    counts_file = runs.parent / f"counts-{ranks}.json"
    last = max(ranks - 1, 0)
    status, text = start(ranks, "count", str(counts_file), str(last), *arguments, "run.name=whole")
    assert status == 0, text
    counts = json.loads(counts_file.read_text())
    draw, kinds = random.Random(seed), sorted(set(killed_run.MOMENTS) & counts.keys())
    draw.shuffle(kinds)
    for i in range(kills):
        kind = kinds[i % len(kinds)]
        count, rank = draw.randint(1, counts[kind]), draw.randrange(max(ranks, 1))
        mine = (*arguments, f"run.name=killed{i}")
        status, _ = start(ranks, kind, str(count), str(rank), *mine)
        left = orphans(f"run.name=killed{i}")
        again, text = start(ranks, "none", "0", "0", *mine, "--resume")
        told = [line for line in text.splitlines() if line.startswith("going on")]
        yield Kill(
            kind=kind,
            count=count,
            of=counts[kind],
            rank=rank,
            killed=status != 0,
            orphans=left,
            went_on=told[-1] if told else f"anew (exit code {again})",
            same=again == 0 and not differing(runs / "whole", runs / f"killed{i}"),
        )


def start(ranks: int, *arguments: str) -> tuple[int, str]:
    """Run killed_run.py and return its exit code and what it printed."""
    return fork(*arguments) if ranks == 0 else launch(ranks, *arguments)


def launch(ranks: int, *arguments: str) -> tuple[int, str]:
    """Start it under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", killed_run.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=600, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def fork(*arguments: str) -> tuple[int, str]:
    """Start it in a fork of this process, which must not have computed anything."""
    import lm_eval.models.huggingface  # noqa: F401

    import fedex_scale.run  # noqa: F401

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(writing, stream)
        os.close(reading)
        killed_run.main(*arguments)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def orphans(word: str) -> int:
    """Return how many processes of a run are left."""
    left = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parts = path.read_bytes().split(b"\0")
        except OSError:
            continue
        left += word.encode() in parts and b"killed_run.py" in b" ".join(parts)
    return left


if __name__ == "__main__":
    main(*sys.argv[1:])
