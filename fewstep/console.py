"""What people see: everything human goes to stderr, a rich progress bar on a terminal and plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.files import json_text

PLAIN_INTERVAL_S = 10.0


def stderr() -> Console:
    """A console on the present stderr. Wide where there is no terminal, so that lines stay whole in logs."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=200)


def say(text: str) -> None:
    """One line for people, without markup. It is never broken, so that a command in it can be copied."""
    stderr().print(text, markup=False, soft_wrap=True)


def emit_json(document: Mapping[str, Any]) -> None:
    """The one JSON document that ``--json`` puts on stdout."""
    sys.stdout.write(json_text(document))
    sys.stdout.flush()


class Meter:
    """Shows how far a piece of work has come. Use through ``meter``."""

    def __init__(self, title: str, bar: Progress | None) -> None:
        self._title = title
        self._bar = bar
        self._task = bar.add_task(title, total=None, detail="") if bar else None
        self._last_shown = time.monotonic()

    def update(self, done: int, total: int, detail: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
            return
        now = time.monotonic()
        if done == total or now - self._last_shown >= PLAIN_INTERVAL_S:
            self._last_shown = now
            say(f"{self._title}: {done}/{total}  {detail}")


@contextmanager
def meter(title: str, *, show: bool = True) -> Iterator[Meter]:
    """A progress meter on stderr; ``show=False`` (worker processes) stays silent on a terminal and in logs."""
    console = stderr() if show else Console(quiet=True)
    if show and not console.is_terminal:
        yield Meter(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, disable=not show) as bar:
        yield Meter(title, bar)
