"""Goals: what some student has to reach, as gates are what every row has to keep. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fewstep.errors import UsageError, nearest
from fewstep.evaluation.bounds import Bound, Relative, bound_of, bounded_names, value_of
from fewstep.evaluation.gates import split_bound
from fewstep.evaluation.report.significance import Difference, difference, reach
from fewstep.evaluation.report.wording import direction
from fewstep.evaluation.results import Measured, Report, Row


@dataclass(frozen=True)
class Goal:
    """Some student has ``metric`` at most (``max``) or at least (``min``) ``bound``, at ``steps`` steps or at any."""

    metric: str
    side: Literal["max", "min"]
    bound: Bound
    steps: int | None = None

    def __str__(self) -> str:
        bound = str(self.bound) if isinstance(self.bound, Relative) else f"{self.bound:g}"
        at = "" if self.steps is None else f" at {self.steps} step" + ("" if self.steps == 1 else "s")
        return f"{self.metric} {'≤' if self.side == 'max' else '≥'} {bound}{at}"


@dataclass(frozen=True)
class Reached:
    """How the student that comes nearest to a goal, or exceeds it most, stands to it.

    ``row`` is None where no student was measured at the goal's steps. ``bound`` is a number, from ``teacher`` where the
    goal is relative. ``margin`` is value less bound, and ``half`` how far its 95 % interval reaches to both sides; None
    where nothing tells the noise.
    """

    goal: Goal
    row: Row | None
    value: float = math.nan
    bound: float = math.nan
    teacher: Row | None = None
    half: float | None = None

    @property
    def margin(self) -> float:
        return self.value - self.bound

    @property
    def kept(self) -> bool:
        return self.margin <= 0 if self.goal.side == "max" else self.margin >= 0

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval of the margin holds 0: other noise might have decided otherwise. None if not known."""
        return None if self.half is None else abs(self.margin) <= self.half

    @property
    def missed_by(self) -> float | None:
        """How far the value is on the wrong side, as a share of the bound; None where it is not, or the bound is 0."""
        return None if self.kept or not self.bound or self.row is None else abs(self.margin / self.bound)


def parse_goal(text: str) -> Goal:
    """A goal as the command line has it, ``METRIC=BOUND`` or ``METRIC=BOUND@STEPS`` (``bounds.FORMS``): that or better,
    by the metric's own direction. A metric that has none is a ``UsageError``."""
    metric, bound, steps = split_bound(text, "--goal")
    better = direction(metric)
    if better is None:
        raise UsageError(f"--goal {text}: neither more nor less of {metric} is known to be better")
    return Goal(metric, "max" if better == "lower" else "min", bound, steps)


def reached(goal: Goal, report: Report) -> Reached:
    """How the best student stands to a goal: whether *some* row keeps it, where a gate asks it of *every* row.

    A relative bound is that of the student's own teacher, where the report has it. A metric that no student has, or a
    teacher that is missing, is a ``UsageError``.
    """
    students = [row for row in report.rows if row.role == "student"]
    if not students:
        raise UsageError(f"a goal on {goal.metric}, and no student was measured")
    known = bounded_names(students)
    if goal.metric not in known:
        raise UsageError(f"a goal on {goal.metric}, which is not measured; {nearest(goal.metric, known)}")
    found = [_held(goal, row, report) for row in students if goal.steps in (None, row.steps)]
    sign = 1.0 if goal.side == "max" else -1.0
    known_ones = [each for each in found if math.isfinite(each.margin)]
    return min(known_ones, key=lambda each: sign * each.margin, default=Reached(goal, None))


def _held(goal: Goal, row: Row, report: Report) -> Reached:
    bound, teacher = bound_of(goal.bound, goal.metric, row, _teachers(row, report))
    return Reached(goal, row, value_of(row, goal.metric), bound, teacher, _half(goal, row, teacher))


def _teachers(row: Row, report: Report) -> Sequence[Row]:
    """The rows of the teacher that a student was distilled from; of all where that is not among them."""
    teachers = [other for other in report.rows if other.role == "teacher"]
    own = {model.teacher_digest for model in report.models if model.name == row.model} - {None}
    return [teacher for teacher in teachers if teacher.digest in own] or teachers


def _half(goal: Goal, row: Row, teacher: Row | None) -> float | None:
    """How far the 95 % interval of value less bound reaches to both sides.

    Of ``a - f b`` it is at most that of ``a - b``, which shared noise makes small, and ``|1 - f|`` times that of ``b``;
    or that of ``a`` and ``f`` times that of ``b`` (the triangle inequality of standard deviations): the narrower one. A
    Fréchet distance's is that of its debiased value, here around the plain one: what other samples would have given.
    """
    if teacher is None:
        return reach(row, goal.metric)
    assert isinstance(goal.bound, Relative)
    factor, apart = goal.bound.factor, difference(row, teacher, goal.metric)
    if apart is not None and apart.how == "trainings":  # independent ones, whose scaled difference is known directly
        return _width(difference(row, _scaled(teacher, factor), goal.metric))
    paired, mine, theirs = _width(apart), reach(row, goal.metric), reach(teacher, goal.metric)
    known = [] if paired is None or factor != 1 else [paired]
    if theirs is not None:
        known += [] if paired is None else [paired + abs(1 - factor) * theirs]
        known += [] if mine is None else [mine + factor * theirs]
    return min(known, default=None)


def _width(found: Difference | None) -> float | None:
    """Half the length of an interval."""
    if found is None or found.low is None or found.high is None:
        return None
    return (found.high - found.low) / 2


def _scaled(row: Row, factor: float) -> Row:
    """A row whose metrics are multiplied."""

    def times(found: Measured) -> Measured:
        low, high, sd = (None if each is None else factor * each for each in (found.low, found.high, found.sd))
        return Measured(factor * found.value, low, high, sd)

    return replace(row, metrics={name: times(found) for name, found in row.metrics.items()})
