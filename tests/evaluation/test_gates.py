"""Gates: what keeps them, what does not, and what is no gate."""

import math
from dataclasses import replace

import pytest

from fewstep.errors import GateFailed, UsageError
from fewstep.evaluation.bounds import Relative, parse_bound, teacher_of
from fewstep.evaluation.gates import Gate, check_gates, parse_gate
from fewstep.evaluation.results import Measured, Row


def row(steps: int, value: float, guidance: float = 1.0) -> Row:
    metrics = {"fid": Measured(value), "recall": Measured(1 - value)}
    return Row("a", "student", "meanflow", steps, steps, "jumps", guidance, 10, 0, metrics, None, None, 3, "aa")


def test_parsed() -> None:
    assert parse_gate("fid=12.5", "max") == Gate("fid", "max", 12.5)
    assert parse_gate("recall_pixels = 0.5@4", "min") == Gate("recall_pixels", "min", 0.5, 4)


@pytest.mark.parametrize("text", ["fid", "fid=", "=3", "fid=x", "fid=nan", "fid=inf", "fid=3@", "fid=3@x", "fid=3@1.5"])
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(UsageError, match="--max takes METRIC=BOUND"):
        parse_gate(text, "max")


def test_a_bound_may_be_reached() -> None:
    check_gates([Gate("fid", "max", 0.5), Gate("recall", "min", 0.5)], [row(1, 0.5)])


def test_the_row_that_failed_is_named() -> None:
    rows = [row(1, 0.4), row(4, 0.6, guidance=2.0)]
    with pytest.raises(GateFailed, match=r"fid at 4 steps, guidance 2 is 0\.6, above 0\.5 \(a\)"):
        check_gates([Gate("fid", "max", 0.5)], rows)
    with pytest.raises(GateFailed, match=r"recall at 4 steps.* below 0\.5"):
        check_gates([Gate("recall", "min", 0.5)], rows)
    check_gates([Gate("fid", "max", 0.5, steps=1)], rows)  # the other step count is not asked about


def test_what_is_not_a_number_fails() -> None:
    for side in ("max", "min"):
        with pytest.raises(GateFailed, match="nan"):
            check_gates([Gate("fid", side, 0.0)], [row(1, math.nan)])  # type: ignore[arg-type]


def test_a_gate_that_nothing_could_fail_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'fid'"):
        check_gates([Gate("fidd", "max", 1.0)], [row(1, 0.1)])
    with pytest.raises(UsageError, match="at 2 steps"):
        check_gates([Gate("fid", "max", 1.0, steps=2)], [row(1, 0.1)])


# Bounds relative to the teacher -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bound", "said"),
    [
        ("teacher", Relative(), "teacher"),
        ("1.05*teacher", Relative(1.05), "1.05 × teacher"),
        (" 0.05 * teacher ", Relative(0.05), "0.05 × teacher"),
        ("teacher-0.02", Relative(1.0, -0.02), "teacher - 0.02"),
        ("teacher + 2e-2", Relative(1.0, 0.02), "teacher + 0.02"),
        ("2*teacher-1", Relative(2.0, -1.0), "2 × teacher - 1"),
    ],
)
def test_what_is_relative(text: str, bound: Relative, said: str) -> None:
    assert parse_bound(text) == bound
    assert str(bound) == said
    assert parse_gate(f"fid={text}@4", "max") == Gate("fid", "max", bound, 4)


@pytest.mark.parametrize(
    "text",
    [
        *("2teacher", "teacher*2", "teacher2", "teachers", "teacher-", "teacher--1", "teacher-x", "x*teacher"),
        *("*teacher", "nan*teacher", "teacher-inf", "0*teacher", "-1*teacher", "-teacher", "teacher-teacher"),
        *("2*3*teacher", ""),
    ],
)
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_bound(text)


def teacher(steps: int, value: float, **changes: object) -> Row:
    return replace(row(steps, value), model="t", role="teacher", **changes)  # type: ignore[arg-type]


TEACHERS = [teacher(64, 0.4), teacher(4, 0.1)]
"""At its most steps the worse one: what counts is the steps."""


def test_the_teacher_at_most_steps_is_the_measure() -> None:
    students = [row(1, 0.44), row(4, 0.42)]
    check_gates([Gate("fid", "max", Relative(1.1))], students, TEACHERS)
    check_gates([Gate("fid", "max", Relative(1.05), steps=4)], students, TEACHERS)
    with pytest.raises(GateFailed, match=r"fid at 1 steps is 0\.44, above 0\.42 = 1\.05 × teacher at 64 steps \(a\)"):
        check_gates([Gate("fid", "max", Relative(1.05))], students, TEACHERS)
    check_gates([Gate("recall", "min", Relative(1.0, -0.02), steps=4)], students, TEACHERS)
    with pytest.raises(GateFailed, match=r"recall at 1 steps is 0\.56, below 0\.58 = teacher - 0\.02 at 64"):
        check_gates([Gate("recall", "min", Relative(1.0, -0.02))], students, TEACHERS)


def test_teachers_are_not_held_against_themselves() -> None:
    """At 4 steps this teacher is far worse than at 64, and a student has to be no worse than at 64."""
    rows = [teacher(64, 0.4), teacher(4, 0.9), row(4, 0.4)]
    check_gates([Gate("fid", "max", Relative())], rows)
    with pytest.raises(GateFailed, match="at 4 steps"):
        check_gates([Gate("fid", "max", 0.5)], rows)
    with pytest.raises(UsageError, match="that is for students"):
        check_gates([Gate("fid", "max", Relative())], TEACHERS)
    with pytest.raises(UsageError, match="at 64 steps, which are not measured: 4 are"):
        check_gates([Gate("fid", "max", Relative(), steps=64)], rows)


def test_the_teacher_of_the_same_guidance_is_the_measure() -> None:
    guided = [teacher(64, 0.2, guidance=1.0), teacher(64, 0.4, guidance=2.0)]
    assert teacher_of(row(1, 0.3, guidance=2.0), guided) is guided[1]
    assert teacher_of(row(1, 0.3, guidance=3.0), guided) is guided[0]
    assert teacher_of(replace(row(1, 0.3), n=11), guided) is None
    check_gates([Gate("fid", "max", Relative())], [row(1, 0.3, guidance=2.0)], guided)


def test_a_measure_that_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match=r"\(teacher\), and no teacher was measured"):
        check_gates([Gate("fid", "max", Relative())], [row(4, 0.4)])
    with pytest.raises(UsageError, match="which has no recall"):
        check_gates([Gate("recall", "min", Relative())], [row(4, 0.4)], [teacher(64, 0.4, metrics={})])
    with pytest.raises(GateFailed, match="above nan"):
        check_gates([Gate("fid", "max", Relative())], [row(4, 0.4)], [teacher(64, math.nan)])


def test_times_are_gates_too() -> None:
    fast = replace(row(4, 0.4), latency_ms=2.0, images_per_s=500.0)
    slow = teacher(64, 0.4, latency_ms=32.0, images_per_s=30.0)
    check_gates([parse_gate("latency_ms=2", "max"), parse_gate("images_per_s=10*teacher", "min")], [fast], [slow])
    with pytest.raises(GateFailed, match=r"latency_ms at 4 steps is 2, above 1\.6 = 0\.05 × teacher at 64 steps"):
        check_gates([parse_gate("latency_ms=0.05*teacher@4", "max")], [fast], [slow])
    with pytest.raises(UsageError, match="a gate on latency_ms, which is not measured"):
        check_gates([Gate("latency_ms", "max", 1.0)], [row(4, 0.4)])
