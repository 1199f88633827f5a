"""Give every command files as nobody should have written them, and see what it does.

    PYTHONPATH=.:tests python tests/faults/fuzz.py BASE RUN FOLDER COUNT SEED [SECONDS]

BASE is a model, RUN a finished run with scores; FOLDER takes the copies. Prints a line of JSON for
each case. What may come of one: a result that is valid, or one line and exit code 2. Never a
traceback, a wait without end, a file elsewhere, control characters on a terminal, or much memory.

hypothesis draws the cases: which command, which of the files that it reads, and what is done to it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from damage import damage
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

LIMIT_S = 30


def main(base: str, run: str, folder: str, count: str, number: str, seconds: str = "1e9") -> None:
    import fedex_scale.aggregation.offline
    import fedex_scale.federation.export
    import fedex_scale.reporting.page
    import fedex_scale.run
    import fedex_scale.scoring.post_hoc  # noqa: F401

    ends = time.monotonic() + float(seconds)
    cases = commands(Path(base), Path(run), Path(folder))
    usual = {name: observe(name, *case, None)["extra_bytes"] for name, case in cases.items()}

    @seed(int(number))
    @settings(
        max_examples=int(count),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        if time.monotonic() > ends:
            raise Over
        name = data.draw(st.sampled_from(sorted(cases)))
        seen = observe(name, *cases[name], data)
        seen["too_much_memory"] = seen.pop("extra_bytes") > 2 * usual[name] + 2**26
        print(json.dumps({"command": name, **seen}), flush=True)

    with suppress(Over):
        fuzz()


class Over(KeyboardInterrupt):  # which hypothesis lets through
    """The time is up."""


def commands(base: Path, run: Path, folder: Path) -> dict[str, tuple]:
    """Return what is run: the input that is copied and changed, and the command line."""
    clients = run / "clients" / "round-0001"
    out = folder / "out"
    names = sorted(x.name for x in clients.iterdir())

    def aggregate(base: Path, clients: Path) -> list[str]:
        folders = [str(clients / name) for name in names]
        return ["aggregate", "--base", str(base), "--out", str(out), *folders]

    cases = {
        "aggregate": (clients, lambda copy: aggregate(base, copy)),
        "aggregate base": (base, lambda copy: aggregate(copy, clients)),
        "export": (run, lambda copy: ["export", str(copy), "--out", str(out)]),
        "report": (run, lambda copy: ["report", str(copy), "--out", str(out)]),
        "compare": (run, lambda copy: ["compare", str(run), str(copy)]),
        "config": (run, lambda copy: ["config", "--check", str(copy / "config.yaml")]),
        "evaluate": (run, lambda copy: ["evaluate", str(copy), "--out", str(out), "--limit", "1"]),
        "resume": (run, lambda copy: resume(run, copy)),
    }
    return {name: (source, line, folder) for name, (source, line) in cases.items()}


def resume(run: Path, copy: Path) -> list[str]:
    """Return what has the copy go on for a round more, from its checkpoint."""
    place = [f"run.dir={copy.parent}", f"run.name={copy.name}"]
    return ["run", "--config", str(run / "config.yaml"), "--resume", *place, "federation.rounds=2"]


def observe(
    name: str,
    source: Path,
    line: Callable[[Path], list[str]],
    folder: Path,
    data: st.DataObject | None,
) -> dict[str, Any]:
    """Run a command in a fork on a damaged copy, and return what became of it."""
    for place in (folder / "copy", folder / "out"):
        shutil.rmtree(place, ignore_errors=True)
    copy = folder / "copy"
    shutil.copytree(source, copy)
    what = damage(name, copy, data) if data is not None else {}
    before = snapshot(folder)
    reading, writing = os.pipe()
    began, child = time.monotonic(), os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        start(line(copy))
    os.close(writing)
    text, ended = bytearray(), (0, 0, None)
    os.set_blocking(reading, False)
    while ended[0] == 0:
        if time.monotonic() - began > LIMIT_S:
            os.kill(child, 9)
        text += drained(reading)
        ended = os.wait4(child, os.WNOHANG)
        time.sleep(0.005)
    text += drained(reading)
    os.close(reading)
    code, out = os.waitstatus_to_exitcode(ended[1]), folder / "out"
    told = text.decode(errors="replace")
    errors = [x for x in told.splitlines() if x.startswith("error: ")]
    after = snapshot(folder)
    changed = {x for x in before.keys() | after.keys() if before.get(x) != after.get(x)}
    own = {x for x in changed if name == "resume" and x.startswith("copy")}
    outcome = {0: "accepted", 2: "refused"}.get(code, f"failed ({code})")
    if "Traceback" in told or (code == 2 and len(errors) != 1):
        outcome = "traceback" if "Traceback" in told else "lines"
    if code == -9:
        outcome = "hang"
    return {
        "outcome": outcome,
        "output_left": out.exists() and code != 0,
        "not_finite": code == 0 and not finite(out),
        "writes_elsewhere": sorted(changed - own - {"out"})[:5],
        "controls": any(not (x.isprintable() or x in "\n\r\t") for x in told),
        "extra_bytes": max(0, ended[2].ru_maxrss * 1024 - resident()),
        "told": "" if outcome in ("accepted", "refused") else told[-1500:],
        **what,
    }


def start(arguments: list[str]) -> None:
    """Be the command, and end."""
    from fedex_scale import cli

    resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    code = 1
    try:
        cli.main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def drained(number: int) -> bytes:
    found = bytearray()
    try:
        while block := os.read(number, 2**16):
            found += block
    except BlockingIOError:
        pass
    return bytes(found)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return what lies below, but for what is in OUT."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not name.startswith("out/"):
            status = path.lstat()
            is_file = not path.is_dir() or path.is_symlink()
            found[name] = (status.st_mode, status.st_size, status.st_mtime_ns) if is_file else ()
    return found


def finite(out: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    return all(
        tensor.isfinite().all()
        for file in out.rglob("*.safetensors")
        for tensor in load_file(file).values()
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool
    )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(*sys.argv[1:])
