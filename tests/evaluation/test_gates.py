"""Gates: what keeps them, what does not, and what is no gate."""

import math

import pytest

from fewstep.errors import GateFailed, UsageError
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
    with pytest.raises(UsageError, match="--max takes METRIC=NUMBER"):
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
