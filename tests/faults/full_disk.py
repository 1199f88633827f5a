"""Let the disk fill up at several moments of a run, make room, and let the run go on.

    PYTHONPATH=.:tests unshare --map-root-user --mount \
        python tests/faults/full_disk.py CONFIG MOMENTS [section.key=value ...]

The run directory lies on a small tmpfs, whose sizes are spread over what a run needs in all.
Prints a line of JSON for each. Exit code 77: a file system cannot be mounted here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml
from kills import fork
from resuming import differing

SMALLEST = 2**16


def main(config: str, moments: str, *overrides: str) -> None:
    runs = Path(yaml.safe_load(Path(config).read_text())["run"]["dir"])
    disk = runs.parent / "disk"
    disk.mkdir(exist_ok=True)
    arguments = ("none", "0", "0", "--config", config, *overrides)
    status, text = fork(*arguments, "run.name=whole")
    assert status == 0, text
    needed = sum(file.stat().st_size for file in (runs / "whole").rglob("*") if file.is_file())
    number = int(moments)
    for i in range(number):
        size = SMALLEST + (needed - SMALLEST) * i // number
        if not mount(disk, size):
            sys.exit(77)
        mine = (*arguments, f"run.dir={disk}", "run.name=full")
        status, text = fork(*mine)
        told = [line for line in text.splitlines() if line.startswith("error: ")]
        mount(disk, 2**28, "remount,")
        again, text = fork(*mine, "--resume")
        seen = {
            "size": size,
            "stopped": status in (1, 2),
            "lines": len(told),
            "traceback": "Traceback" in text,
            "went_on": again == 0,
            "same": again == 0 and not differing(runs / "whole", disk / "full"),
        }
        print(json.dumps({**seen, "told": told, "text": text[-500:] if again else ""}), flush=True)
        subprocess.run(["umount", str(disk)], check=True)


def mount(disk: Path, size: int, how: str = "") -> bool:
    options = f"{how}size={size}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
