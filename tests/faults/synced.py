"""Which files of a directory a command had not let reach the disk, as strace saw it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

CALLS = "openat,creat,mkdir,mkdirat,rename,renameat,renameat2,fsync,fdatasync"
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (\d+)")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")


def unsynced(
    command: list[str], folder: Path, trace: Path, *, later: str = "", **options
) -> list[str]:
    """Run a command, and return a line for each file or name below `folder` that was not synced.

    Paths are to be absolute. A file has to be before what holds it is renamed, and a directory
    after a name in it changed; what is still to be at the end is told, if it is still there.

    Args:
        later: what is renamed to a path with this in it may be synced afterwards.
    """
    strace = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(trace)]
    subprocess.run([*strace, *command], check=True, capture_output=True, timeout=300, **options)
    return _read(trace, folder, later)


def _read(trace: Path, folder: Path, later: str) -> list[str]:
    found: list[str] = []
    dirty: dict[str, str] = {}
    for name, arguments in _calls(trace):
        if name in ("fsync", "fdatasync"):
            dirty.pop(re.search(r"<(.*?)>", arguments)[1], None)
            continue
        places = _paths(arguments)
        if not places or not places[-1].startswith(str(folder)) or "/.lock" in places[-1]:
            continue  # nobody needs a lock after a power cut
        if name == "creat" or (name == "openat" and re.search("O_WRONLY|O_RDWR", arguments)):
            dirty[places[0]] = "written"
            if "O_CREAT" in arguments or name == "creat":
                dirty[str(Path(places[0]).parent)] = "holds a new name"
        elif name.startswith("mkdir"):
            dirty[places[0]] = "made"
            dirty[str(Path(places[0]).parent)] = "holds a new name"
        elif name.startswith("rename"):
            old, new = places
            below = [x for x in dirty if x == old or x.startswith(f"{old}/")]
            if later and later in new:
                dirty |= {new + x[len(old) :]: dirty.pop(x) for x in below}
                below = []
            found += [f"{x} {dirty.pop(x)}, then renamed to {new}" for x in below]
            dirty[str(Path(new).parent)] = "holds a new name"
            dirty.pop(new, None)
    return found + [f"{x} {why}" for x, why in dirty.items() if Path(x).exists()]


def _calls(trace: Path):
    """Yield the calls that succeeded, those that others came between put together again."""
    begun: dict[str, str] = {}
    for line in trace.read_text(errors="replace").splitlines():
        number = line.split(maxsplit=1)[0]
        if line.endswith("<unfinished ...>"):
            begun[number] = line.removesuffix("<unfinished ...>")
            continue
        if resumed := _RESUMED.match(line):
            line = begun.pop(number, "") + resumed[2]
        if call := _CALL.match(line):
            yield call[1], call[2]


def _paths(arguments: str) -> list[str]:
    """Return the paths among arguments, those beside a directory's descriptor joined to it."""
    found = re.findall(r'(?:AT_FDCWD<([^>]*)>|\d+<([^>]*)>)?(?:, )?"((?:[^"\\]|\\.)*)"', arguments)
    return [str(Path(here or there or "/") / name) for here, there, name in found]
