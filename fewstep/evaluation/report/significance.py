"""Whether two rows differ by more than noise, from what their ``results.json`` says alone.

Rows share their noise, so that a difference is known better than either value. The evaluation states the paired
difference of a row to the teacher's (``Row.differences``); between two others it follows that the standard error of
``a - b`` is at most the sum of those of ``a - teacher`` and ``b - teacher`` (the triangle inequality for standard
deviations), or of those of ``a`` and ``b``, however they depend on each other: a wider interval, never a narrower one.
"""

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.evaluation.report.wording import debiased, direction, ends, measured
from fewstep.evaluation.results import Measured, Row

Verdict = Literal["better", "worse", "within noise", "unknown"]


@dataclass(frozen=True)
class Difference:
    """``a - b`` of ``metric``; ``low`` and ``high`` are the ends of its 95 % interval, None where no method gives one.

    ``how``: "paired" as the evaluation measured it; "bound" from the sum of two standard errors; "trainings" from the
    spread over training seeds; "values" without an interval.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    how: Literal["paired", "bound", "trainings", "values"] = "values"

    def verdict(self) -> Verdict:
        """Whether ``a`` is better than ``b``; "unknown" without an interval or a better direction."""
        better = direction(self.metric)
        if self.low is None or self.high is None or better is None:
            return "unknown"
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if (self.high < 0) == (better == "lower") else "worse"


def difference(a: Row, b: Row, metric: str) -> Difference | None:
    """The difference of two rows in a metric; None where one lacks it or they are of unequally many samples.

    That of a Fréchet distance is of the debiased values where both have them: its bias does not cancel between rows of
    different covariance.
    """
    if a.n != b.n:
        return None
    better = debiased(metric)
    name = better if better and measured(a, better) and measured(b, better) else metric
    x, y = measured(a, name), measured(b, name)
    if x is None or y is None:
        return None
    if x.sd is not None or y.sd is not None:
        return _over_trainings(name, x, y, a.seeds, b.seeds)
    value = x.value - y.value
    known = [_stated(a, b, name, value), _by_values(a, b, name, metric, value)]
    return min((found for found in known if found is not None), key=_width, default=Difference(name, value))


def beats(a: Row, b: Row, metric: str) -> bool:
    """Whether ``a`` is better than ``b`` beyond noise; by the values alone where nothing tells the noise."""
    found, better = difference(a, b, metric), direction(metric)
    if found is None or better is None:
        return False
    verdict = found.verdict()
    if verdict == "unknown":
        return found.value < 0 if better == "lower" else found.value > 0
    return verdict == "better"


def within_noise(a: Row, b: Row, metric: str) -> bool:
    """Whether an interval says that nothing separates the two."""
    found = difference(a, b, metric)
    return found is not None and found.verdict() == "within noise"


def half_width(found: Measured | None) -> float | None:
    """How far a 95 % interval reaches from its middle: further than half its length where it is cut off at 0 or 1."""
    if found is None or found.low is None or found.high is None:
        return None
    reach = (found.high - found.low) / 2
    return max(reach, found.high - found.value, found.value - found.low) if ends(found) is not None else reach


def reach(row: Row, metric: str) -> float | None:
    """How far the 95 % interval of a row's own value reaches, over its samples or over trainings. That of a Fréchet
    distance is its debiased value's."""
    found = measured(row, metric)
    if found is not None and found.sd is not None:
        return _student(row.seeds - 1.0) * found.sd / math.sqrt(row.seeds) if row.seeds > 1 else None
    return half_width(measured(row, debiased(metric) or "")) or half_width(found)


def _width(found: Difference) -> float:
    return math.inf if found.low is None or found.high is None else found.high - found.low


def _stated(a: Row, b: Row, name: str, value: float) -> Difference | None:
    """From the differences to the teacher's row that the evaluation measured, if they are to the same row."""
    mine, theirs = _to_teacher(a, name), _to_teacher(b, name)
    # Which row a difference is to, the values tell: it is the one that it leads to.
    if mine is not None and b.role == "teacher" and _same(mine.value, value, a, b, name):
        return Difference(name, mine.value, mine.low, mine.high, "paired")
    if theirs is not None and a.role == "teacher" and _same(-theirs.value, value, a, b, name):
        low, high = theirs.low, theirs.high
        return Difference(name, -theirs.value, None if high is None else -high, None if low is None else -low, "paired")
    if mine is None or theirs is None or not _same(mine.value - theirs.value, value, a, b, name):
        return None
    one, other = half_width(mine), half_width(theirs)
    return None if one is None or other is None else _around(name, value, one + other)


def _to_teacher(row: Row, name: str) -> Measured | None:
    found = row.differences.get(name)
    return found if found is not None and found.low is not None and found.high is not None else None


def _same(stated: float, value: float, a: Row, b: Row, name: str) -> bool:
    scale = max(abs(row.metrics[name].value) for row in (a, b))
    return math.isclose(stated, value, rel_tol=1e-6, abs_tol=1e-6 * scale)


def _by_values(a: Row, b: Row, name: str, metric: str, value: float) -> Difference | None:
    # The interval of a debiased distance may stand at the plain one.
    one, other = (half_width(measured(row, name)) or half_width(measured(row, metric)) for row in (a, b))
    return None if one is None or other is None else _around(name, value, one + other)


def _around(name: str, value: float, half: float) -> Difference:
    return Difference(name, value, value - half, value + half, "bound")


def _over_trainings(name: str, x: Measured, y: Measured, seeds_x: int, seeds_y: int) -> Difference:
    """Welch's interval over independent trainings; a single training has the spread of the others."""
    value = x.value - y.value
    if x.sd is not None and y.sd is not None:
        parts = [(x.sd**2 / seeds_x, seeds_x - 1), (y.sd**2 / seeds_y, seeds_y - 1)]
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / of for part, of in parts) if variance > 0 else 1.0
    else:
        sd, seeds = (x.sd, seeds_x) if x.sd is not None else (y.sd, seeds_y)
        variance, freedom = (sd or 0.0) ** 2 * (1 / seeds_x + 1 / seeds_y), seeds - 1.0
    half = _student(freedom) * math.sqrt(variance)
    return Difference(name, value, value - half, value + half, "trainings")


def _student(freedom: float) -> float:
    """The 97.5 % point of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
