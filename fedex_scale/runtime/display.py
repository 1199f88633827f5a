"""The live display: one line for the training, and one below while something is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedex_scale.runtime import launched

PLAIN_LINE_EVERY_S = 10.0


def make_display(console: Console) -> Progress:
    """Return the display, which shows nothing where there is no terminal, or another rank speaks.

    Its tasks have the fields `unit`, of what is counted, and `state`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal or not launched.is_first(),
    )


@contextmanager
def scoring(
    display: Progress, when: str, say: Callable[[str], None]
) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a scoring has come; yield what is to be told of each answer.

    Args:
        when: such as "before training".
        say: prints a line, every ten seconds where there is no terminal.
    """
    task = display.add_task(f"{when}: preparing to score", total=None, unit="prompts", state="")
    began = last = time.perf_counter()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal began, last
        now = time.perf_counter()
        began = began if done else now
        left = f"{duration((total - done) * (now - began) / done)} left" if done else ""
        doing = f"{when}: scoring {what}"
        display.update(task, description=escape(doing), completed=done, total=total, state=left)
        if display.disable and now - last > PLAIN_LINE_EVERY_S and done:
            last = now
            say(f"{doing}, {done}/{total} prompts, {left}")

    try:
        yield tell
    finally:
        display.remove_task(task)


def duration(seconds: float) -> str:
    """Return a time as people say it: 2 h 5 min, 3 min 20 s, 7 s."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
