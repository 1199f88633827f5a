"""A line that lives while something takes its time and there is nothing to count."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedex_scale.runtime import launched


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what is going on, and for how long; elsewhere nothing.

    Other lines may be printed meanwhile, and stand above it.
    """
    console = Console(highlight=False, stderr=True)
    columns = SpinnerColumn(), TextColumn(what, markup=False), TimeElapsedColumn()
    silent = not console.is_terminal or not launched.is_first()
    shown = Progress(
        *columns,
        console=console,
        transient=True,
        disable=silent,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file goes there
    )
    with shown:
        shown.add_task("", total=None)
        yield
