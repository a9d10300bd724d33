"""``metrics.jsonl`` of a run: each line holds the means since the line before."""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.checkpoint import RunDirectory
from fewstep.distill.metrics import Sums, sums_of
from fewstep.distill.objective import LossOutput
from fewstep.distill.reading import Reading


class MetricsLog:
    """Collects the metrics of every step and writes a line when asked to.

    Made at finished step ``step`` after ``seconds`` of training. ``window`` are sums that no line has told yet, from
    the ``window_state`` of a checkpoint, so that a resumed run logs what one run would have. ``over_processes`` sums a
    tensor over all processes: all of them add, ask for the state and write at the same steps, and the one with
    ``speaks`` writes lines.
    """

    def __init__(
        self,
        run: RunDirectory,
        batch_size: int,
        *,
        step: int,
        seconds: float,
        window: Any = None,
        over_processes: Callable[[Tensor], Tensor] = lambda value: value,
        speaks: bool = True,
    ) -> None:
        self._run = run
        self._batch_size = batch_size
        self._step = step
        self._seconds = seconds
        self._over_processes = over_processes
        self._speaks = speaks
        self._outputs: list[LossOutput] = []
        self._norms: list[float | Reading] = []
        self._window: Sums | None = None
        if window is not None:
            self._window = Sums(tuple(window["names"]), torch.tensor(window["value"], dtype=torch.float64))

    def add(self, outputs: Sequence[LossOutput], grad_norm: float | Reading) -> None:
        """Take note of a step; nothing is computed yet, and nothing read."""
        self._outputs.extend(outputs)
        self._norms.append(grad_norm)

    def _sums(self) -> Sums | None:
        if self._outputs:
            norms = [norm.values()[1] if isinstance(norm, Reading) else norm for norm in self._norms]
            new = sums_of(self._outputs, norms)
            new = Sums(new.names, self._over_processes(new.value).cpu())
            self._window = new if self._window is None else self._window + new
            self._outputs, self._norms = [], []
        return self._window

    def window_state(self) -> dict[str, Any] | None:
        """What ``window`` takes: plain values."""
        sums = self._sums()
        return None if sums is None else {"names": list(sums.names), "value": sums.value.tolist()}

    def write(self, step: int, stage: str, lr: float, seconds: float) -> dict[str, float]:
        """Write the line of ``step`` and start a new window. Returns its single numbers. Reads the device."""
        sums = self._sums()
        assert sums is not None
        means = sums.means()
        rate = (step - self._step) * self._batch_size / max(seconds - self._seconds, 1e-9)
        line = {
            "step": step,
            "stage": stage,
            "lr": lr,
            "seconds": round(seconds, 3),
            "samples_per_s": round(rate, 1),
            "peak_memory_mib": round(peak_memory_mib(), 1),
            **{name: _plain(value) for name, value in means.items()},
        }
        if self._speaks:
            self._run.append_metrics(line)
        self._window, self._step, self._seconds = None, step, seconds
        return {name: value for name, value in means.items() if isinstance(value, float) and math.isfinite(value)}


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
