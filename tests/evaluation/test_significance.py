"""Differences of rows and whether they are noise: never a shorter interval than the truth, and no front by noise."""

import math
from dataclasses import replace

import numpy as np
import pytest
from reports import make_report, rich_report

from fewstep.evaluation.report.figures import dominated
from fewstep.evaluation.report.significance import beats, difference, within_noise
from fewstep.evaluation.results import Measured, Row

Z = 1.959964


def row(
    value: float, half: float | None = None, *, role: str = "student", to_teacher: tuple[float, float] | None = None
) -> Row:
    """A row with ``fd_pixels`` and, if told, its difference to a teacher, each with half the length of its interval."""
    ends = () if half is None else (value - half, value + half)
    found = {}
    if to_teacher is not None:
        apart, reach = to_teacher
        found["fd_pixels"] = Measured(apart, apart - reach, apart + reach)
    template = make_report().rows[0]
    return replace(template, role=role, metrics={"fd_pixels": Measured(value, *ends)}, differences=found)  # type: ignore[arg-type]


def test_a_difference_to_the_teacher_is_the_paired_one() -> None:
    teacher, student = row(0.5, 0.1, role="teacher"), row(0.4, 0.1, to_teacher=(-0.1, 0.02))
    found = difference(student, teacher, "fd_pixels")
    assert found is not None
    assert (found.how, found.value) == ("paired", pytest.approx(-0.1))
    assert (found.low, found.high) == (pytest.approx(-0.12), pytest.approx(-0.08))
    assert found.verdict() == "better"
    back = difference(teacher, student, "fd_pixels")
    assert back is not None
    assert (back.low, back.high) == (pytest.approx(0.08), pytest.approx(0.12))
    assert (back.how, back.verdict()) == ("paired", "worse")


def test_a_difference_to_another_teacher_is_not_taken_for_this_one() -> None:
    """The stated difference leads to 0.5; a teacher at 0.6 is not the row that it is to."""
    student = row(0.4, 0.1, to_teacher=(-0.1, 0.02))
    found = difference(student, row(0.6, 0.1, role="teacher"), "fd_pixels")
    assert found is not None
    assert (found.how, found.low, found.high) == ("bound", pytest.approx(-0.4), pytest.approx(0.0))


def test_two_students_are_compared_through_their_teacher() -> None:
    a, b = row(0.4, 0.1, to_teacher=(-0.1, 0.02)), row(0.47, 0.1, to_teacher=(-0.03, 0.01))
    found = difference(a, b, "fd_pixels")
    assert found is not None
    assert (found.how, found.value, found.low, found.high) == (
        "bound",
        *(pytest.approx(end) for end in (-0.07, -0.1, -0.04)),
    )
    # Their own intervals overlap and would have called it noise.
    assert within_noise(replace(a, differences={}), replace(b, differences={}), "fd_pixels")
    assert not within_noise(a, b, "fd_pixels")


@pytest.mark.parametrize("coupling", [0.0, 0.5, 0.95])
def test_the_bound_is_never_below_the_paired_interval(coupling: float) -> None:
    """Influences of three rows on shared seeds: what follows from the stated numbers holds the true interval."""
    draws = np.random.default_rng(0).normal(size=(4, 1000))
    shared, own = draws[0], draws[1:]
    h_teacher, h_a, h_b = (coupling * shared + math.sqrt(1 - coupling**2) * each for each in own)
    h_a = 2 * h_a

    def half(influence: np.ndarray) -> float:
        return float(Z * influence.std(ddof=1) / math.sqrt(len(influence)))

    a = row(0.4, half(h_a), to_teacher=(-0.1, half(h_a - h_teacher)))
    b = row(0.45, half(h_b), to_teacher=(-0.05, half(h_b - h_teacher)))
    found = difference(a, b, "fd_pixels")
    assert found is not None
    assert found.high is not None
    assert found.high - found.value >= half(h_a - h_b)
    assert found.high - found.value <= half(h_a) + half(h_b) + 1e-12


def test_the_debiased_distance_is_the_one_compared() -> None:
    rich = rich_report().rows
    teacher = next(row for row in rich if row.role == "teacher" and row.steps == 64)
    student = next(row for row in rich if (row.model, row.steps) == ("digits-meanflow", 4))
    moved = {**student.metrics, "fd_debiased_pixels": Measured(0.41, 0.38, 0.44)}  # 0.43 - 0.02
    stated = {"fd_debiased_pixels": Measured(-0.12, -0.14, -0.10)}  # of 0.54 - 0.01
    found = difference(replace(student, metrics=moved, differences=stated), teacher, "fd_pixels")
    assert found is not None
    assert (found.metric, found.how, found.value) == ("fd_debiased_pixels", "paired", pytest.approx(-0.12))


def test_nothing_is_known_without_intervals_and_nothing_compared_of_unequal_n() -> None:
    a, b = row(0.4), row(0.5, 0.01)
    found = difference(a, b, "fd_pixels")
    assert found is not None
    assert (found.how, found.low, found.verdict()) == ("values", None, "unknown")
    assert beats(a, b, "fd_pixels")
    assert not beats(b, a, "fd_pixels")
    assert difference(a, replace(b, n=500), "fd_pixels") is None
    assert difference(a, b, "recall_pixels") is None
    assert not beats(a, replace(b, n=500), "fd_pixels")


def test_an_interval_cut_off_at_one_reaches_as_far_as_its_other_side() -> None:
    """A precision of 0.99 with the ends 0.96 and 1 has a standard error of 0.03 and not of 0.02."""
    template = make_report().rows[0]
    a = replace(template, metrics={"precision_pixels": Measured(0.99, 0.96, 1.0)})
    b = replace(template, metrics={"precision_pixels": Measured(0.94, 0.92, 0.96)})
    found = difference(a, b, "precision_pixels")
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(0.1))


def test_trainings_are_compared_by_their_spread() -> None:
    from scipy import stats

    template = make_report().rows[0]
    a = replace(template, seeds=3, metrics={"fd_pixels": Measured(0.40, sd=0.02)})
    b = replace(template, seeds=5, metrics={"fd_pixels": Measured(0.50, sd=0.05)})
    found = difference(a, b, "fd_pixels")
    assert found is not None
    assert (found.low, found.high, found.how) != (None, None, "values")
    assert found.low is not None
    assert found.high is not None
    # The interval's end touches 0 at the level where Welch's test has this p.
    p = stats.ttest_ind_from_stats(0.40, 0.02, 3, 0.50, 0.05, 5, equal_var=False).pvalue
    assert (found.high < 0) == (p < 0.05)
    freedom = (0.02**2 / 3 + 0.05**2 / 5) ** 2 / ((0.02**2 / 3) ** 2 / 2 + (0.05**2 / 5) ** 2 / 4)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(0.02**2 / 3 + 0.05**2 / 5)
    assert (found.low, found.high) == (pytest.approx(-0.1 - half), pytest.approx(-0.1 + half))
    # One training against five: the five say how far one strays.
    single = difference(replace(a, seeds=1, metrics={"fd_pixels": Measured(0.40)}), b, "fd_pixels")
    assert single is not None
    assert single.high == pytest.approx(-0.1 + stats.t.ppf(0.975, 4) * 0.05 * math.sqrt(1 + 1 / 5))


def test_a_point_is_dominated_only_beyond_noise() -> None:
    """Four points by growing time: the second is worse than the first by less than noise, the third by more; the fourth
    is the best."""
    values = ((1.0, 0.50), (2.0, 0.52), (3.0, 0.60), (4.0, 0.30))
    rows = [replace(row(value, to_teacher=(value - 0.5, 0.02)), latency_ms=ms) for ms, value in values]
    assert dominated(rows, "fd_pixels") == [2]
    # Judged by the values alone where there are no intervals.
    bare = [replace(each, differences={}) for each in rows]
    assert dominated(bare, "fd_pixels") == [1, 2]
    # Equally fast: the better one wins.
    assert dominated([replace(each, latency_ms=1.0) for each in rows], "fd_pixels") == [0, 1, 2]
    assert dominated([replace(each, latency_ms=None) for each in rows], "fd_pixels") == []
