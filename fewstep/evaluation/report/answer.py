"""Which rows are compared, and the one sentence that answers the question."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.evaluation.report.significance import Difference, difference
from fewstep.evaluation.report.wording import (
    counted,
    extractors,
    interval,
    measured,
    number,
    of_extractor,
    plural,
    primary,
    split,
    times_as_long,
    value,
    with_spread,
)
from fewstep.evaluation.results import Report, Row

FEW_STEPS = (1, 2, 4)


@dataclass(frozen=True)
class Series:
    """One curve: the rows of a model with one sampler, guidance, sample count and seed, by steps."""

    label: str
    role: Literal["teacher", "student"]
    rows: tuple[Row, ...]


def series(report: Report) -> list[Series]:
    """Teachers, then students, as first met. A label says more than the model's name only where it must."""

    def traits(row: Row) -> tuple[str, ...]:
        average = f"ema {row.ema}" if row.ema else "exported weights"
        drawn = (f"n = {row.n:,}", f"seed {row.seed}")
        return (row.role, row.sampler, f"w = {row.guidance:g}", average, *drawn, row.digest[:8])

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.model, *traits(row)), []).append(row)
    curves = []
    for (model, *mine), rows in groups.items():
        namesakes = [others for name, *others in groups if name == model]
        differing = [trait for i, trait in enumerate(mine) if len({other[i] for other in namesakes}) > 1]
        label = f"{model} ({', '.join(differing)})" if differing else model
        curves.append(Series(label, rows[0].role, tuple(sorted(rows, key=lambda row: row.steps))))
    return sorted(curves, key=lambda curve: curve.role != "teacher")


def reference_row(report: Report) -> Row | None:
    """The teacher at its most steps: what ratios and speed-ups are against. Of several, the best by the primary."""
    teachers = [row for row in report.rows if row.role == "teacher"]
    metric = primary(report) or ""

    def rank(row: Row) -> tuple[float, float]:
        distance = value(row, metric)
        return -row.steps, math.inf if distance is None else distance

    return min(teachers, key=rank, default=None)


def ratio(row: Row, reference: Row | None, metric: str) -> float | None:
    """The row's metric over the reference's; None unless both are measured, on as many samples."""
    if reference is None or row.n != reference.n:
        return None
    mine, theirs = value(row, metric), value(reference, metric)
    return mine / theirs if mine is not None and theirs else None


def speed_up(row: Row, reference: Row | None) -> float | None:
    if reference is None or not row.latency_ms or not reference.latency_ms:
        return None
    return reference.latency_ms / row.latency_ms


def best_student(report: Report, metric: str, steps: Sequence[int]) -> Row | None:
    """The student with the lowest ``metric`` at one of these step counts; equals go to the fewer steps."""
    reference = reference_row(report)
    students = [r for r in report.rows if r.role == "student" and r.steps in steps and value(r, metric) is not None]
    # Distances on different sample counts have different biases: prefer what compares with the teacher.
    comparable = [row for row in students if reference is not None and row.n == reference.n] or students
    return min(comparable, key=lambda row: (value(row, metric), row.steps), default=None)


def leading_student(report: Report) -> Row | None:
    """The student that the headline is about: the best at 1, 2 or 4 steps, or else at the fewest there are."""
    metric = primary(report)
    steps = [row.steps for row in report.rows if row.role == "student"]
    if metric is None or not steps:
        return None
    return best_student(report, metric, FEW_STEPS) or best_student(report, metric, (min(steps),))


def label_of(report: Report, row: Row) -> str:
    return next(curve.label for curve in series(report) if row in curve.rows)


# --- the answer --------------------------------------------------------------------------------------------------


def headline(report: Report, code: Callable[[str], str] = lambda name: f"`{name}`") -> str:
    """One computed sentence: the best few-step student against the teacher at its most steps.

    ``code`` marks up every name that comes from outside, so that it can also escape it.
    """
    metric, reference = primary(report), reference_row(report)
    if metric is None:
        return "No Fréchet distance was measured, so no student can be named best."
    shown, best = code(counted(metric, report.rows)), leading_student(report)
    if best is None:
        if reference is None or value(reference, metric) is None:
            return f"No row has a value of {shown}."
        found = number(value(reference, metric))
        return f"No student was measured; at {plural(reference.steps)} the teacher has {shown} {found}."
    at, name, found = plural(best.steps), code(label_of(report, best)), with_spread(measured(best, metric))
    found += f" over {best.seeds} trainings" if best.seeds > 1 else ""
    opening = f"At {at}, {name} has {shown} {found}"
    if reference is None:
        return f"{opening}; no teacher was measured beside it, so what was lost is not known."
    whose = "the teacher" if len({c.label for c in series(report) if c.role == "teacher"}) == 1 else None
    theirs = f"{whose or code(label_of(report, reference))}'s {reference.steps}-step figure"
    if reference.n != best.n:
        return f"{opening}; {theirs} is on another number of samples and does not compare."
    quotient, noise = ratio(best, reference, metric), difference(best, reference, metric)
    if quotient is None:
        return f"{opening}; {theirs} is {number(value(reference, metric))}, which gives no ratio."
    if number(value(best, metric)) == number(value(reference, metric)):
        sentence = f"{opening}, equal to {theirs}"
    elif quotient < 1 or (noise is not None and noise.verdict() == "within noise"):
        sentence = f"{opening}, {number(quotient)}× {theirs} (lower is better)"
    else:
        several = len({c.label for c in series(report) if c.role == "student"}) > 1
        who = "even the best student" if several else "the student"
        sentence = f"At {at}, {who} is worse than the teacher: {name} has {shown} {found}, "
        sentence += f"{number(quotient)}× {theirs}"
    faster = speed_up(best, reference)
    sentence += f", {times_as_long(faster)}" if faster else ""
    return f"{sentence}{_recall_clause(best, reference, recall_of(report, metric))}{_noise_clause(noise)}."


def recall_of(report: Report, metric: str) -> str:
    return of_extractor("recall", split(metric, extractors(report))[1] or "inception")


def _recall_clause(best: Row, reference: Row, recall: str) -> str:
    mine, theirs = value(best, recall), value(reference, recall)
    if mine is None or theirs is None:
        return ""
    if number(mine) == number(theirs):
        return f"; recall stays at {number(mine)}"
    return f"; recall {'falls' if mine < theirs else 'rises'} from {number(theirs)} to {number(mine)}"


def _noise_clause(found: Difference | None) -> str:
    """How sure the difference is, where an interval says so."""
    if found is None or found.low is None or found.high is None:
        return ""
    what = "debiased difference" if "debiased" in found.metric else "difference"
    what = f"paired {what}" if found.how == "paired" else what
    within = interval(found.low, found.high)
    if found.verdict() == "within noise":
        return f"; the {what} of {number(found.value)} is within noise, 95% interval {within}"
    return f"; the {what} is {number(found.value)}, 95% interval {within}"
