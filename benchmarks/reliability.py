"""Kill, damage and fill up: how often a run goes on and ends as if nothing had happened.

    python benchmarks/reliability.py [--kills 25] [--rank-kills 5] [--full-disks 10]
        [--output-kills 10] [--fuzz-minutes 60] [--cost CONFIG]

prints the table of docs/reliability.md. 0 leaves a row out. The cost of checkpoints is measured
in the run of CONFIG (with MODEL=... as override if need be), the rest on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "faults"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in (("kills", 25), ("rank-kills", 5), ("full-disks", 10)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--output-kills", type=int, default=10)
    parser.add_argument("--fuzz-minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", help="a config whose checkpoints are to be timed")
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value, for --cost")
    options = parser.parse_args()
    if options.timed:
        print(json.dumps(timed_run(options.cost, options.overrides)))
        return
    print("| what | count | result |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(options, Path(folder)):
            print("| " + " | ".join(row) + " |", flush=True)


def rows(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the table's rows, each when it has been measured."""
    seed = options.seed
    if options.kills:
        seen = start("kills.py", prepare(folder / "plain"), options.kills, seed, 0)
        yield kill_row("kill -9, plain PyTorch", seen)
    if options.rank_kills:
        zero3 = f"engine.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
        seen = start("kills.py", prepare(folder / "zero3"), options.rank_kills, seed, 2, zero3)
        yield kill_row("kill -9 of one rank of 2, ZeRO-3", seen)
    if options.output_kills:
        yield output_row(prepare(folder / "outputs"), options.output_kills, seed)
    if options.fuzz_minutes:
        yield fuzz_row(prepare(folder / "fuzzed"), options.fuzz_minutes, seed)
    if options.full_disks:
        unshare = ("unshare", "--map-root-user", "--mount")
        config = prepare(folder / "disks")
        seen = start("full_disk.py", config, options.full_disks, before=unshare)
        good = sum(x["stopped"] and x["lines"] == 1 and x["same"] for x in seen)
        yield "full disk (tmpfs)", str(len(seen)), f"{good} stop on one line, go on, bit-equal"
    if options.cost:
        yield cost_row(options.cost, options.overrides)


def prepare(folder: Path) -> Path:
    """Write the tiny model and the config, in a process of their own, as forks want none."""
    folder.mkdir()
    program = (
        "import sys; from pathlib import Path; from tiny import make_llama; "
        "from resuming import write_config; folder = Path(sys.argv[1]); "
        "heldout = {'fedex_word_problems': str(folder / 'heldout.jsonl')}; "
        "write_config(make_llama(folder / 'llama'), folder, evaluation="
        "{'tasks': ['fedex_word_problems'], 'data': heldout})"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], env=ENVIRONMENT, check=True)
    return folder / "run.yaml"


def start(script: str, *arguments: object, before: tuple[str, ...] = ()) -> list[dict]:
    """Run one of tests/faults' scripts and return what it saw."""
    command = [*before, sys.executable, str(FAULTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{script}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def kill_row(what: str, seen: list[dict]) -> tuple[str, str, str]:
    for bad in (x for x in seen if not (x["killed"] and x["same"]) or x["orphans"]):
        print(f"  {bad}", file=sys.stderr)
    kinds = sorted({x["kind"] for x in seen})
    good = sum(x["killed"] and x["same"] for x in seen)
    orphans = sum(x["orphans"] for x in seen)
    where = f"{what}: in {', '.join(kinds)}"
    return where, str(len(seen)), f"{good} resume bit-equal, {orphans} orphans"


def fuzz_row(config: Path, minutes: float, seed: int) -> tuple[str, str, str]:
    """Draw cases for so long, and print on stderr what fell short."""
    source, place = finished_run(config), config.parent / "sandbox"
    place.mkdir()
    began, seen = time.monotonic(), []
    while (left := 60 * minutes - (time.monotonic() - began)) > 0:
        arguments = (config.parent / "llama", source, place, 2000, seed + len(seen), left)
        seen += start("fuzz.py", *arguments)
    faults = ("output_left", "not_finite", "writes_elsewhere", "controls", "too_much_memory")
    fine = ("accepted", "refused")
    bad = [x for x in seen if x["outcome"] not in fine or any(x[name] for name in faults)]
    for case in bad:
        print(f"  {case}", file=sys.stderr)
    refused = sum(x["outcome"] == "refused" for x in seen)
    text = f"{refused} refused on one line, {len(bad)} fell short"
    return f"drawn files, every command, {minutes:g} minutes", str(len(seen)), text


def output_row(config: Path, each: int, seed: int) -> tuple[str, str, str]:
    source, place = finished_run(config), config.parent / "sandbox"
    place.mkdir()
    seen = start("killed_outputs.py", config.parent / "llama", source, place, each, seed)
    good = sum(x["out"] != "half" for x in seen)
    left = sum(x["scratch_after_next"] for x in seen)
    commands = sorted({x["command"] for x in seen})
    text = f"OUT whole or absent in {good}; {left} scratch directories after the next call"
    return f"kill -9 of {', '.join(commands)}", str(len(seen)), text


def finished_run(config: Path) -> Path:
    """Do a run of one round, scored by one item, and return its directory."""
    program = "import sys; from fedex_scale.run import run_config; run_config(*eval(sys.argv[1]))"
    given = repr((str(config), ["run.name=source", "federation.rounds=1", "evaluation.limit=1"]))
    subprocess.run(
        [sys.executable, "-c", program, given], env=ENVIRONMENT, check=True, capture_output=True
    )
    return config.parent / "runs" / "source"


def cost_row(config: str, overrides: list[str]) -> tuple[str, str, str]:
    command = [sys.executable, __file__, "--timed", "--cost", config, *overrides]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    seen = json.loads(done.stdout.splitlines()[-1])
    share = seen["saving_s"] / seen["rounds_s"]
    text = f"{share:.2%} of the rounds' time ({seen['saving_s']:.2f} of {seen['rounds_s']:.0f} s)"
    return f"checkpoints of {config}", str(seen["saves"]), text


def timed_run(config: str, overrides: list[str]) -> dict:
    """Do a run, and return how long its rounds and its checkpoints took."""
    from fedex_scale.config.load import load_config
    from fedex_scale.federation.saves import Saver
    from fedex_scale.run import run_config

    real, seconds = Saver.save, []

    def save(saver: Saver, place) -> None:
        began = time.perf_counter()
        real(saver, place)
        seconds.append(time.perf_counter() - began)

    Saver.save = save
    run_config(config, overrides)
    metrics = load_config(config, overrides).run.path / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    scoring = sum(x["took_s"] for x in events if x["event"] == "eval" and x["round"] == 0)
    last = max(x["seconds"] for x in events if x["event"] == "round")
    return {"saves": len(seconds), "saving_s": sum(seconds), "rounds_s": last - scoring}


if __name__ == "__main__":
    main()
