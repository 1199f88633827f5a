"""A chat template is a program of whoever made the model: it is tried where it can do no harm."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

from fedex_scale.runtime.errors import UserError

SECONDS, MEMORY = 5, 2**30
"""Of processor time, and beyond what this process has: far more than any template takes."""


def check_ends(render: Callable[[], object]) -> None:
    """Raise a UserError where rendering does not end, or takes all memory; tried in a child.

    Args:
        render: raises what it will; that is not looked at here.
    """
    child = os.fork()
    if not child:
        _try(render)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        what = f"{SECONDS} s" if code < 0 else f"{MEMORY >> 20:,} MB"
        raise UserError(
            f"model.path: the tokenizer's chat template takes more than {what} for three short "
            "turns; set data.chat_template to another"
        )


def _try(render: Callable[[], object]) -> None:
    """Render within bounds, and end this process: 3 for lack of memory, by a signal for time."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        render()
    except MemoryError:
        os._exit(3)
    except BaseException:  # told of where it is rendered for good
        os._exit(0)
    os._exit(0)
