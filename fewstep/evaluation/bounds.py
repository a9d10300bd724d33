"""Bounds of gates and of goals: a number, or one relative to the teacher's row at its most steps. Imports no torch."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewstep.errors import UsageError
from fewstep.evaluation.results import Row

SPEEDS = ("latency_ms", "images_per_s")
"""What a row has beside its metrics and may be bounded too."""

FORMS = "NUMBER, teacher, K*teacher, teacher+K or teacher-K"
"""What a bound is written as."""


@dataclass(frozen=True)
class Relative:
    """``factor`` times what the teacher has in the same metric at its most steps, plus ``offset``."""

    factor: float = 1.0
    offset: float = 0.0

    def of(self, teacher: float) -> float:
        return self.factor * teacher + self.offset

    def __str__(self) -> str:
        scaled = "teacher" if self.factor == 1 else f"{self.factor:g} × teacher"
        return scaled + (f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else "")


Bound = float | Relative


def parse_bound(text: str) -> Bound:
    """A bound as the command line has it (``FORMS``); ``ValueError`` for anything else, and for what is not finite."""
    before, relative, after = (part.strip() for part in text.partition("teacher"))
    if not relative:
        return _finite(text)
    factor, offset = re.fullmatch(r"(.+)\*", before), re.fullmatch(r"([+-])\s*([^\s+-].*)", after)
    if (before and not factor) or (after and not offset):
        raise ValueError(f"'{text}' is no bound")
    bound = Relative(_finite(factor[1]) if factor else 1.0, _finite(offset[1] + offset[2]) if offset else 0.0)
    if bound.factor <= 0:
        raise ValueError(f"'{text}' is no share of the teacher's")
    return bound


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"'{text}' is not finite")
    return number


def value_of(row: Row, metric: str) -> float:
    """What a row has in a metric, or in one of ``SPEEDS``; NaN where it has nothing."""
    if metric in SPEEDS:
        speed = row.latency_ms if metric == "latency_ms" else row.images_per_s
        return math.nan if speed is None else speed
    return row.metrics[metric].value if metric in row.metrics else math.nan


def bounded_names(rows: Iterable[Row]) -> set[str]:
    """All that some row has and that may be bounded."""
    rows = list(rows)
    speeds = {name for row in rows for name in SPEEDS if not math.isnan(value_of(row, name))}
    return speeds | {name for row in rows for name in row.metrics}


def teacher_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The teacher's row that a student's is held against: that at most steps, of the same guidance where there is one,
    as the sweep's ``differences`` are. None where no teacher was measured on as many samples."""
    teachers = [other for other in rows if other.role == "teacher" and other.n == row.n]
    guided = [teacher for teacher in teachers if teacher.guidance == row.guidance]
    return max(guided or teachers, key=lambda teacher: teacher.steps, default=None)


def bound_of(bound: Bound, metric: str, row: Row, rows: Sequence[Row]) -> tuple[float, Row | None]:
    """The number that a row is held to, and the teacher's row that it comes from (None of a plain one).

    Without such a row, or where it has no such metric, a relative bound is a ``UsageError``.
    """
    if not isinstance(bound, Relative):
        return bound, None
    teacher = teacher_of(row, rows)
    if teacher is None:
        raise UsageError(f"{metric} is to be held against the teacher ({bound}), and no teacher was measured beside it")
    if metric not in bounded_names([teacher]):
        raise UsageError(f"{metric} is to be held against the teacher ({bound}), which has no {metric}")
    return bound.of(value_of(teacher, metric)), teacher
