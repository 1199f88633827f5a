"""A line that lives while something takes its time and there is nothing to count."""

from __future__ import annotations

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
    console = Console(highlight=False)
    columns = SpinnerColumn(), TextColumn(what, markup=False), TimeElapsedColumn()
    silent = not console.is_terminal or not launched.is_first()
    with Progress(*columns, console=console, transient=True, disable=silent) as shown:
        shown.add_task("", total=None)
        yield
