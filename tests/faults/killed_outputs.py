"""Kill commands at drawn moments: OUT is whole or absent, and the next call leaves nothing else.

    PYTHONPATH=.:tests python tests/faults/killed_outputs.py BASE RUN FOLDER KILLS SEED

Takes what fuzz.py takes, undamaged, and prints a line of JSON for each kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import fuzz

COMMANDS = ("aggregate", "export", "report", "evaluate")


def main(base: str, run: str, folder: str, kills: str, seed: str) -> None:
    import lm_eval.models.huggingface  # noqa: F401

    import fedex_scale.aggregation.offline
    import fedex_scale.federation.export
    import fedex_scale.reporting.page
    import fedex_scale.run
    import fedex_scale.scoring.post_hoc  # noqa: F401

    draw, place = random.Random(int(seed)), Path(folder)
    cases = fuzz.commands(Path(base), Path(run), place)
    for name in COMMANDS:
        source, line, _ = cases[name]
        usual = timed(source, line, place, None)
        whole = files(place / "out")
        for _ in range(int(kills)):
            after = draw.uniform(0.2, 1.05) * usual
            timed(source, line, place, after)
            found = files(place / "out")
            left = len(leftovers(place))
            timed(source, line, place, None, keep=True)
            seen = {
                "command": name,
                "after": round(after / usual, 3),
                "out": "absent" if found is None else "whole" if found == whole else "half",
                "scratch": left,
                "scratch_after_next": len(leftovers(place)),
            }
            print(json.dumps(seen), flush=True)


def timed(source: Path, line, folder: Path, kill_after: float | None, *, keep=False) -> float:
    """Run a command in a fork, perhaps not to its end, and return the seconds."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    if not keep:
        for path in (folder / "copy", *leftovers(folder)):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source, folder / "copy")
    began, child = time.monotonic(), os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        fuzz.start(line(folder / "copy"))
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if kill_after is not None and time.monotonic() - began > kill_after:
            os.kill(child, 9)
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
    return time.monotonic() - began


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in ("copy", "out")]


def files(out: Path) -> set[str] | None:
    if not out.exists():
        return None
    return {str(path.relative_to(out)) for path in out.rglob("*")}


if __name__ == "__main__":
    main(*sys.argv[1:])
