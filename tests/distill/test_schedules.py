"""Schedules: closed forms, ends, monotone between them."""

import math

import pytest

from fewstep.distill.flow_maps.schedules import Constant, Exponential, Ramp, Schedule, Sigmoid

DONE = [k / 1000 for k in range(1000)]


def test_constant() -> None:
    assert {Constant(0.3)(done) for done in DONE} == {0.3}


def test_ramp() -> None:
    ramp = Ramp(0.2, 0.8, 0.25, 0.75)
    for done, value in ((0.0, 0.2), (0.2499, 0.2), (0.25, 0.2), (0.375, 0.35), (0.5, 0.5), (0.75, 0.8), (1.0, 0.8)):
        assert ramp(done) == pytest.approx(value, abs=1e-15)
    assert Ramp(0.0, 1.0)(0.0) == 0.0
    assert Ramp(0.0, 1.0)(0.3) == pytest.approx(0.3)


def test_a_ramp_of_no_length_is_a_jump() -> None:
    """Also at the beginning: a warm-up of none of the training is none."""
    assert (Ramp(0.0, 1.0, 0.4, 0.4)(0.3999), Ramp(0.0, 1.0, 0.4, 0.4)(0.4)) == (0.0, 1.0)
    assert Ramp(0.0, 0.99, 0.0, 0.0)(0.0) == 0.99


def test_exponential() -> None:
    """A constant share per step: the middle is the geometric mean."""
    schedule = Exponential(0.1, 0.002)
    assert schedule(0.0) == 0.1
    assert schedule(1.0) == pytest.approx(0.002, rel=1e-12)
    assert schedule(0.5) == pytest.approx(math.sqrt(0.1 * 0.002), rel=1e-12)
    for done in DONE[:-1]:
        assert schedule(done + 1e-3) / schedule(done) == pytest.approx((0.002 / 0.1) ** 1e-3, rel=1e-12)


def test_sigmoid() -> None:
    """``1 - sigmoid(25 ((done - begin) / (end - begin) - 1/2))``: half way one half, and what is within .005 of an end
    is the end, from ``1/2 -+ ln(199) / 25`` on."""
    schedule = Sigmoid(0.2, 0.6)
    assert schedule(0.4) == pytest.approx(0.5, rel=1e-12)
    assert schedule(0.44) == pytest.approx(1 / (1 + math.exp(2.5)), rel=1e-12)
    assert schedule(0.36) == pytest.approx(1 - schedule(0.44), rel=1e-12)
    reach = 0.4 * math.log(199) / 25
    for edge, outside, inside in ((0.4 - reach, 1.0, 0.995), (0.4 + reach, 0.0, 0.005)):
        sign = math.copysign(1, edge - 0.4)
        assert schedule(edge + sign * 1e-6) == outside
        assert schedule(edge - sign * 1e-6) == pytest.approx(inside, rel=1e-3)
    assert schedule(0.0) == schedule(0.2) == 1.0
    assert schedule(0.6) == schedule(1.0) == 0.0


def test_a_short_sigmoid_does_not_overflow() -> None:
    sharp = Sigmoid(0.5, 0.5 + 1e-9)
    assert (sharp(0.0), sharp(0.4), sharp(0.6), sharp(1.0)) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("schedule", "sign"),
    [
        (Ramp(0.0, 0.99, 0.0, 0.1), 1),
        (Ramp(1.0, 0.2, 0.3, 0.9), -1),
        (Exponential(0.1, 0.002), -1),
        (Sigmoid(0, 1), -1),
    ],
)
def test_they_run_one_way(schedule: Schedule, sign: int) -> None:
    values = [sign * schedule(done) for done in DONE]
    assert values == sorted(values)
    assert values[-1] > values[0]
