"""Interrupts as a flag that the training loop reads between steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT, SIGTERM and SIGUSR1 set a flag instead of killing; a SIGINT after that kills as usual.

    SIGUSR1 is what Slurm sends ahead of a time limit (``--signal=USR1@60``); Windows has none. Yields a function that
    says whether a stop was asked for.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
