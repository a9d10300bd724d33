"""Quality gates: bounds that the rows of a run have to keep. Imports no torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.errors import GateFailed, UsageError, nearest
from fewstep.evaluation.results import Row


@dataclass(frozen=True)
class Gate:
    """``metric`` at most (``max``) or at least (``min``) ``bound``, in every row or in those of ``steps`` steps."""

    metric: str
    side: Literal["max", "min"]
    bound: float
    steps: int | None = None

    def check(self, row: Row) -> None:
        """``GateFailed`` unless the row keeps the bound; a NaN does not."""
        value = row.metrics[self.metric].value if self.metric in row.metrics else math.nan
        kept = value <= self.bound if self.side == "max" else value >= self.bound
        if not kept:
            where = f"at {row.steps} steps" + (f", guidance {row.guidance:g}" if row.guidance != 1 else "")
            where += f", average {row.ema}" if row.ema else ""
            side = "above" if self.side == "max" else "below"
            raise GateFailed(f"{self.metric} {where} is {value:.4g}, {side} {self.bound:g} ({row.model})")


def parse_gate(text: str, side: Literal["max", "min"]) -> Gate:
    """A gate as the command line has it, ``METRIC=X`` or ``METRIC=X@STEPS``."""
    metric, equals, rest = text.partition("=")
    bound, at, steps = rest.partition("@")
    try:
        gate = Gate(metric.strip(), side, float(bound), int(steps) if at else None)
    except ValueError:
        gate = None
    if gate is None or not (gate.metric and equals and math.isfinite(gate.bound)):
        raise UsageError(f"--{side} takes METRIC=NUMBER or METRIC=NUMBER@STEPS, got '{text}'")
    return gate


def check_gates(gates: Iterable[Gate], rows: Sequence[Row]) -> None:
    """``GateFailed`` naming the first row that does not keep its bound. A metric that no row has, or a number of steps
    at which none was measured, is a ``UsageError``: such a gate would be kept by anything."""
    for gate in gates:
        check_known([gate], {name for row in rows for name in row.metrics}, {row.steps for row in rows})
        for row in rows:
            if gate.steps in (None, row.steps):
                gate.check(row)


def check_known(gates: Iterable[Gate], metrics: Iterable[str], steps: Iterable[int]) -> None:
    """``UsageError`` for a gate on a metric or on a number of steps that is not measured."""
    metrics, steps = set(metrics), set(steps)
    for gate in gates:
        if gate.metric not in metrics:
            raise UsageError(f"a gate on {gate.metric}, which is not measured; {nearest(gate.metric, metrics)}")
        if gate.steps is not None and gate.steps not in steps:
            counts = ", ".join(map(str, sorted(steps)))
            raise UsageError(f"a gate at {gate.steps} steps, which are not measured: {counts} are")
