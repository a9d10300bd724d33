"""Quality gates: bounds that the rows of a run have to keep. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.errors import GateFailed, UsageError, nearest
from fewstep.evaluation.bounds import FORMS, Bound, Relative, bound_of, bounded_names, parse_bound, value_of
from fewstep.evaluation.results import Row


@dataclass(frozen=True)
class Gate:
    """``metric`` at most (``max``) or at least (``min``) ``bound``, in every row or in those of ``steps`` steps; one
    relative to the teacher in rows of students."""

    metric: str
    side: Literal["max", "min"]
    bound: Bound
    steps: int | None = None

    @property
    def relative(self) -> bool:
        return isinstance(self.bound, Relative)

    def check(self, row: Row, rows: Sequence[Row] = ()) -> None:
        """``GateFailed`` unless the row keeps the bound; a NaN does not. The teacher is looked for among ``rows``."""
        value = value_of(row, self.metric)
        bound, teacher = bound_of(self.bound, self.metric, row, rows)
        kept = value <= bound if self.side == "max" else value >= bound
        if not kept:
            where = f"at {row.steps} steps" + (f", guidance {row.guidance:g}" if row.guidance != 1 else "")
            where += f", average {row.ema}" if row.ema else ""
            side = "above" if self.side == "max" else "below"
            held = f"{bound:g}" if teacher is None else f"{bound:.4g} = {self.bound} at {teacher.steps} steps"
            raise GateFailed(f"{self.metric} {where} is {value:.4g}, {side} {held} ({row.model})")


def parse_gate(text: str, side: Literal["max", "min"]) -> Gate:
    """A gate as the command line has it, ``METRIC=BOUND`` or ``METRIC=BOUND@STEPS`` (``bounds.FORMS``)."""
    metric, bound, steps = split_bound(text, f"--{side}")
    return Gate(metric, side, bound, steps)


def split_bound(text: str, option: str) -> tuple[str, Bound, int | None]:
    """The metric, bound and step count of ``METRIC=BOUND@STEPS``; a ``UsageError`` that names the ``option``."""
    metric, equals, rest = text.partition("=")
    bound, at, steps = rest.partition("@")
    try:
        if metric.strip() and equals:
            return metric.strip(), parse_bound(bound), int(steps) if at else None
    except ValueError:
        pass
    raise UsageError(f"{option} takes METRIC=BOUND or METRIC=BOUND@STEPS, the bound as {FORMS}; got '{text}'")


def check_gates(gates: Iterable[Gate], rows: Sequence[Row], beside: Sequence[Row] = ()) -> None:
    """``GateFailed`` naming the first row that does not keep its bound. The teacher's rows may be among ``rows`` or
    ``beside`` them. A metric that no row has, or a number of steps at which none was measured, is a ``UsageError``:
    such a gate would be kept by anything. So is one relative to a teacher that was not measured."""
    for gate in gates:
        held = [row for row in rows if row.role == "student" or not gate.relative]
        if gate.relative and not held:
            raise UsageError(f"{gate.metric} is to be held against the teacher ({gate.bound}): that is for students")
        check_known([gate], bounded_names(held), {row.steps for row in held})
        for row in held:
            if gate.steps in (None, row.steps):
                gate.check(row, [*rows, *beside])


def check_known(gates: Iterable[Gate], metrics: Iterable[str], steps: Iterable[int]) -> None:
    """``UsageError`` for a gate on a metric or on a number of steps that is not measured."""
    metrics, steps = set(metrics), set(steps)
    for gate in gates:
        if gate.metric not in metrics:
            raise UsageError(f"a gate on {gate.metric}, which is not measured; {nearest(gate.metric, metrics)}")
        if gate.steps is not None and gate.steps not in steps:
            counts = ", ".join(map(str, sorted(steps)))
            raise UsageError(f"a gate at {gate.steps} steps, which are not measured: {counts} are")
