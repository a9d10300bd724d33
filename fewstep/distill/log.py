"""``metrics.jsonl`` of a run: each line holds the means since the line before."""

import math
import resource
import sys
from typing import Any

import torch

from fewstep.checkpoint import RunDirectory
from fewstep.distill.metrics import Sums


class MetricsLog:
    """Collects the metrics of every step and writes a line when asked to.

    Made at finished step ``step`` after ``seconds`` of training; ``window`` are sums that no line has told yet, from
    the ``window_state`` of a checkpoint, so that a resumed run logs what one run would have.
    """

    def __init__(self, run: RunDirectory, batch_size: int, *, step: int, seconds: float, window: Any) -> None:
        self._run = run
        self._batch_size = batch_size
        self._step = step
        self._seconds = seconds
        self._window = None
        if window is not None:
            self._window = Sums(tuple(window["names"]), torch.tensor(window["value"], dtype=torch.float64))

    def add(self, sums: Sums) -> None:
        if self._window is None:
            self._window = sums
        else:
            self._window = Sums(self._window.names, self._window.value.to(sums.value.device)) + sums

    def window_state(self) -> dict[str, Any] | None:
        """What ``window`` takes: plain values."""
        if self._window is None:
            return None
        return {"names": list(self._window.names), "value": self._window.value.tolist()}

    def write(self, step: int, stage: str, lr: float, seconds: float) -> dict[str, float]:
        """Write the line of ``step`` and start a new window. Returns its single numbers. Reads the device."""
        assert self._window is not None
        means = self._window.means()
        rate = (step - self._step) * self._batch_size / max(seconds - self._seconds, 1e-9)
        self._run.append_metrics(
            {
                "step": step,
                "stage": stage,
                "lr": lr,
                "seconds": round(seconds, 3),
                "samples_per_s": round(rate, 1),
                "peak_memory_mib": round(peak_memory_mib(), 1),
                **{name: _plain(value) for name, value in means.items()},
            }
        )
        self.forget(step, seconds)
        return {name: value for name, value in means.items() if isinstance(value, float) and math.isfinite(value)}

    def forget(self, step: int, seconds: float) -> None:
        """Start a new window: what a process does that writes nothing."""
        self._window, self._step, self._seconds = None, step, seconds


def _plain(value: float | list[float]) -> Any:
    """JSON has no NaN: a time nobody was at has no residual."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None


def peak_memory_mib() -> float:
    """The most memory this process has held: on its GPU if it uses one, else of the whole process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
