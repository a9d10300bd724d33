"""Processes that end within a time limit."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from stages import HERE

STOPPED = 130
"""The exit code of what was stopped and can go on."""
GRACE = 20.0
"""Seconds before the limit at which a process is asked to stop."""


class Clock:
    """What is left of a time limit, in seconds; without one there is always enough."""

    def __init__(self, limit: float | None) -> None:
        self.began, self.limit = time.monotonic(), limit

    def left(self) -> float:
        return math.inf if self.limit is None else self.limit - (time.monotonic() - self.began)


def start(words: Sequence[str]) -> Any:
    """``fewstep ...`` or ``measure ...`` as a process of its own."""
    program, *arguments = words
    module = ["-m", "fewstep"] if program == "fewstep" else [str(HERE / f"{program}.py")]
    return subprocess.Popen([sys.executable, *module, *arguments])


def finish(words: Sequence[str], clock: Clock) -> int:
    """Run a command; its exit code. It is asked to stop before the time is over, and killed if it does not."""
    print("+", " ".join(words), file=sys.stderr, flush=True)
    if clock.left() <= GRACE:
        return STOPPED
    process = start(words)
    asked = False
    try:
        while process.poll() is None:
            if clock.left() < GRACE and not asked:
                process.send_signal(signal.SIGINT)
                asked = True
            if clock.left() < 0:
                process.kill()
                print("killed at the limit: what it had saved last is where it goes on", file=sys.stderr)
                break
            time.sleep(0.05)
    except KeyboardInterrupt:  # the terminal has told the process too
        asked = True
        while process.poll() is None:
            time.sleep(0.05)
    process.communicate()
    if process.returncode and asked:
        return STOPPED
    return abs(int(process.returncode))  # negative where another has killed it: a failure
