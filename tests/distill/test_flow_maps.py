"""The flow-map family in closed form: no residual at the exact map of a Gaussian and of a mixture, for every method;
what a wrong map and a wrong rule leave; and where a rule is biased, by how much.

Float64 students on times that are multiples of 1/512, whose differences are exact in float32. ``Delta`` is what the
objectives weigh: it is caught in the place of their weight.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from family import (
    GAUSSIAN,
    KEY,
    TEACHERS,
    Exact,
    ExactStudent,
    ExactTrajectories,
    data,
    deltas,
    double_noise,
    dyadic,
    free_flow,
    matching,
    root,
)
from torch import Tensor

from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Discrete, Eulerian, Lagrangian, Modulated, Split
from fewstep.distill.flow_maps.schedules import Constant
from fewstep.distill.flow_maps.velocity import TeacherVelocity, conditional, diagonal
from fewstep.distill.objective import Objective
from fewstep.distill.tangent import (
    central_difference,
    end_derivative,
    end_difference,
    forward_derivative,
    path_derivative,
    path_difference,
)
from fewstep.flow import expand
from fewstep.keys import Key
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.times import TimePairs, dyadic_pairs

H = 1e-3


def regression(rule: object, **fixed: object) -> Callable[..., FlowMapMatching]:
    """Under the velocity of the teacher."""
    return lambda student, teacher, **changes: matching(student, rule, TeacherVelocity(teacher), **{**fixed, **changes})


UNBIASED: dict[str, Callable[..., Objective]] = {
    "MeanFlow": regression(Eulerian()),
    "improved MeanFlow": regression(Eulerian(tangent=diagonal)),
    "Modular MeanFlow, k = 0": regression(Modulated(path_derivative, Constant(0.0))),
    "Modular MeanFlow, k = 1/2": regression(Modulated(path_derivative, Constant(0.5))),
    "Modular MeanFlow, k = 1": regression(Modulated(path_derivative, Constant(1.0))),
    "SplitMeanFlow": regression(Split("random")),
    "SplitMeanFlow in half": regression(Split("half")),
    "shortcut": regression(Split("half"), pairs=dyadic_pairs(5)),
    "Terminal Velocity": regression(Lagrangian(end_derivative), target_decay=0.99),
    "Lagrangian self-distillation": regression(Lagrangian(end_derivative)),
    "Align Your Flow, EMD": regression(Eulerian(factor=Constant(1.0))),
    "Align Your Flow, LMD": lambda student, teacher, **changes: regression(
        Lagrangian(end_derivative, TeacherVelocity(teacher))
    )(student, teacher, **changes),
    "FreeFlow": lambda student, teacher, **changes: free_flow(student, teacher),
    "trajectory": lambda student, teacher, **changes: ExactTrajectories(
        student, teacher=teacher, solver="euler", nodes=8, noise=double_noise
    ),
}
"""Every method whose exact student has no residual at all."""
SELF_TAUGHT = (
    "SplitMeanFlow",
    "SplitMeanFlow in half",
    "shortcut",
    "Terminal Velocity",
    "Lagrangian self-distillation",
)
"""Methods that hold jumps to what the student itself says of shorter ones."""
METHODS = pytest.mark.parametrize("method", UNBIASED)


# --------------------------------------------------------------------------------------------------- at the exact map


@TEACHERS
@METHODS
def test_no_residual_at_the_exact_map(method: str, teacher: Exact) -> None:
    """Row by row. Measured: below 6e-14; where the time in between is not a multiple of 1/512, 1.3e-7 (a random split,
    the nodes of a trajectory)."""
    delta, _, t, r = deltas(UNBIASED[method](ExactStudent(teacher), teacher), data(teacher, 512))
    assert delta.dtype == torch.float64
    assert int((r < t).sum()) > 300
    assert float((t - r).max()) > 0.8
    rounded = method in ("SplitMeanFlow", "trajectory")
    assert float(delta.detach().abs().max()) < (1e-6 if rounded else 1e-12)


@TEACHERS
@pytest.mark.parametrize(
    "objective",
    [
        regression(Eulerian(), derivative=central_difference(H)),
        regression(Modulated(path_difference(H), Constant(0.5))),
        regression(Lagrangian(end_difference(H))),
        lambda student, teacher: free_flow(student, teacher, derivative=end_difference(H)),
    ],
    ids=["Eulerian", "Modulated", "Lagrangian", "FreeFlow"],
)
def test_finite_differences_leave_their_error(objective: Callable[..., Objective], teacher: Exact) -> None:
    """``h^2`` times a third derivative: measured 8e-5 at most on the mixture, 4e-7 on the Gaussian, for h = 1e-3."""
    delta, _, t, _ = deltas(objective(ExactStudent(teacher), teacher), data(teacher, 512))
    inside = t > 0.05  # near data a mixture changes within less than h
    assert 1e-12 < root(delta[inside]) < 1e-4


@TEACHERS
@METHODS
@pytest.mark.parametrize(("scale", "shift"), [(0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1)])
def test_a_wrong_map_is_seen_and_pulled_back(method: str, teacher: Exact, scale: float, shift: float) -> None:
    """``c u + b``: with a quarter of the rows on the diagonal, descending the loss brings c towards one and b towards
    zero. Measured root residuals: 0.04 to 0.16."""
    student = ExactStudent(teacher, scale)
    student.shift.data += shift
    loss = UNBIASED[method](student, teacher)(data(teacher, 512), KEY).per_sample_B.mean()
    assert math.sqrt(float(loss.detach())) > 0.03
    by_scale, by_shift = torch.autograd.grad(loss, (student.scale, student.shift))
    assert float(by_scale) * (scale - 1) + float(by_shift) * shift > 1e-3


@TEACHERS
@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_residuals_of_a_wrong_scale(teacher: Exact, scale: float) -> None:
    """On the jumps of ``c u``, in closed form::

    Eulerian, modulated       (c - 1) v
    with its own tangent      (c - 1) (v + c (t - r) v . grad u)
    Lagrangian, a teacher's   c v(X, r) - v(f, r),           f = x - c (t - r) u
    Lagrangian, its own       c v(X, r) - c v(f, r)
    """
    batch, c = data(teacher, 256), scale
    exact = ExactStudent(teacher)

    def found(method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        student = ExactStudent(teacher, c)
        delta, x, t, r = deltas(UNBIASED[method](student, teacher, jump_fraction=1.0), batch)
        return x, t, r, delta.detach()

    for method in UNBIASED:
        x, t, r, delta = found(method)
        v, u, gap = teacher(x, t), teacher.average_velocity(x, t, r), expand(t - r, x)
        v_end, v_f = teacher(x - gap * u, r), teacher(x - c * gap * u, r)
        if method in ("MeanFlow", "Align Your Flow, EMD") or method.startswith("Modular"):
            wanted = (c - 1) * v
        elif method == "improved MeanFlow":
            along_x = torch.func.jvp(lambda x, t=t, r=r: exact(x, t, r), (x,), (v,))[1].detach()
            wanted = (c - 1) * (v + c * gap * along_x)
        elif method in ("Align Your Flow, LMD", "FreeFlow"):
            wanted = c * v_end - v_f
        elif method in ("Terminal Velocity", "Lagrangian self-distillation"):
            wanted = c * (v_end - v_f)
        elif method == "trajectory":
            wanted = (c - 1) * u
        else:
            continue
        torch.testing.assert_close(delta, wanted, rtol=0, atol=1e-6)


def test_self_taught_jumps_are_those_of_any_field() -> None:
    """Held to shorter jumps of its own, the exact map of *another* field has no residual where it jumps: which velocity
    it is, only the diagonal tells. And jumps alone need not pull back: of ``u + b`` the Lagrangian rule leaves ``(t -
    r) a(r) b``, which where the slope ``a(r)`` of the velocity is negative (on a Gaussian: near data) drives b away."""
    other = GaussianTeacher(-0.3, 0.9)
    for method in UNBIASED:
        if method == "trajectory":
            continue
        student = ExactStudent(other)
        delta, _, t, r = deltas(UNBIASED[method](student, GAUSSIAN, jump_fraction=0.5), data(GAUSSIAN, 512))
        jumps = r < t
        if method in SELF_TAUGHT:
            assert float(delta.detach()[jumps].abs().max()) < 1e-6, method
        else:
            assert root(delta[jumps]) > 0.3, method
        assert method == "FreeFlow" or root(delta[~jumps]) > 0.3, method

    b, s = 0.1, 0.6
    student = ExactStudent(GAUSSIAN)
    student.shift.data += b
    objective = UNBIASED["Lagrangian self-distillation"](student, GAUSSIAN, jump_fraction=1.0)
    delta, _, t, r = deltas(objective, data(GAUSSIAN, 512))
    slope = (r - (1 - r) * s**2) / ((1 - r) ** 2 * s**2 + r**2)
    torch.testing.assert_close(delta.detach()[:, 0], ((t - r) * slope * b).double(), rtol=1e-5, atol=1e-7)
    assert (delta.detach()[r < 0.26] <= 0).all()
    assert (delta.detach()[(r > 0.27) & (r < t)] > 0).all()


# ----------------------------------------------------------------------------------------------- rules that are biased


def at(t: float, r: float) -> Callable[..., TimePairs]:
    """One pair for all rows, in float64."""

    def pairs(key: Key, index: Tensor, jump: Tensor) -> TimePairs:
        one = torch.ones(len(index), dtype=torch.float64)
        return TimePairs(t * one, r * one)

    return pairs


def sd(t: float, s: float) -> float:
    return math.hypot((1 - t) * s, t)


@TEACHERS
@pytest.mark.parametrize("k", [0.0, 0.5, 0.99])
def test_a_factor_below_one_leaves_part_of_the_derivative(teacher: Exact, k: float) -> None:
    """``Delta = -(1 - k) (t - r) du/dt``: at k = 0.99 still a pull to the velocity."""
    student = ExactStudent(teacher)
    objective = regression(Eulerian(factor=Constant(k)))(student, teacher, jump_fraction=1.0)
    delta, x, t, r = deltas(objective, data(teacher, 512))
    du_dt = forward_derivative(student, x, teacher(x, t), t, r, None)
    torch.testing.assert_close(delta.detach(), -(1 - k) * expand(t - r, x) * du_dt, rtol=0, atol=1e-6)
    assert root(delta) > 0.3 * (1 - k)


def test_bias_of_a_discrete_step() -> None:
    """On the Gaussian with s = 0.6 from t = 0.8 to r = 0.2, ``(u - target) / alpha`` is linear in ``x - mu_t``. At a
    distance of 1.94 (2.4 standard deviations) it is 0.315, 0.111, 0.036 and 0.0032 for alpha = 0.5, 0.25, 0.1 and 0.01:
    of first order. At alpha = 1 it is ``u - v``."""
    t, r, s, m, batch = 0.8, 0.2, 0.6, 0.4, data(GAUSSIAN, 64)

    def slope_of_v(t: float) -> float:
        return (t - (1 - t) * s**2) / sd(t, s) ** 2

    def slope_of_u(t: float, r: float) -> float:
        return (1 - sd(r, s) / sd(t, s)) / (t - r)

    def per_unit(alpha: float) -> float:
        student = ExactStudent(GAUSSIAN)
        objective = regression(Discrete(Constant(alpha)), pairs=at(t, r))(student, GAUSSIAN, jump_fraction=1.0)
        delta, x, _, _ = deltas(objective, batch)
        offset = x - (1 - t) * m
        slope = (delta / offset).detach()
        torch.testing.assert_close(slope, slope[0].expand_as(slope), rtol=1e-8, atol=1e-10)
        q = t - alpha * (t - r)
        later = slope_of_u(q, r) * (1 - alpha * (t - r) * slope_of_v(t)) if alpha < 1 else 0.0
        wanted = (slope_of_u(t, r) - alpha * slope_of_v(t) - (1 - alpha) * later) / alpha
        assert float(slope[0]) == pytest.approx(wanted, rel=1e-6)
        return -wanted

    table = {0.5: 0.315, 0.25: 0.111, 0.1: 0.036, 0.01: 0.0032}
    for alpha, size in table.items():
        assert 1.94 * per_unit(alpha) == pytest.approx(size, rel=0.02 if alpha == 0.01 else 0.005)
    small = (1e-2, 1e-3, 1e-4)
    order = np.polyfit(np.log(small), np.log([per_unit(alpha) for alpha in small]), 1)[0]
    assert order == pytest.approx(1, abs=0.02)
    assert -per_unit(1.0) == pytest.approx(slope_of_u(t, r) - slope_of_v(t), rel=1e-12)


def test_bias_of_the_finest_level() -> None:
    """Where halving ends, two Euler steps of half the length stand for the jump: ``Delta = -(d / 4) Dv/Dt``, of second
    order in where it lands. ``Dv/Dt = s^2 / sd_t^4 (x - mu_t)``. Longer jumps know nothing of it."""
    t, s, m, batch, errors = 0.75, 0.6, 0.4, data(GAUSSIAN, 64), []
    lengths = (2.0**-3, 2.0**-5, 2.0**-7)
    for d in lengths:
        rule = Split("half", finest=d)
        student = ExactStudent(GAUSSIAN)
        delta, x, _, _ = deltas(regression(rule, pairs=at(t, t - d))(student, GAUSSIAN, jump_fraction=1.0), batch)
        along = s**2 / sd(t, s) ** 4 * (x - (1 - t) * m)
        torch.testing.assert_close(delta.detach(), -d / 4 * along, rtol=2 * d, atol=1e-12)
        errors.append(d * root(delta))
        delta, _, _, _ = deltas(
            regression(rule, pairs=at(t, t - 2 * d))(ExactStudent(GAUSSIAN), GAUSSIAN, jump_fraction=1.0), batch
        )
        assert root(delta) < 1e-12
    assert np.polyfit(np.log(lengths), np.log(errors), 1)[0] == pytest.approx(2, abs=0.1)


def test_a_clipped_rule_is_biased_beyond_its_bound() -> None:
    """States and targets of a split, targets of a discrete step: within the bound nothing changes, beyond it the
    student is held to the bound. Data of a standard deviation of six."""
    teacher = GaussianTeacher(0.0, 6.0)
    for bound in (0.0, 1e3):
        for rule in (Split("half", clip=bound), Discrete(Constant(1e-4), clip=bound)):
            delta, _, _, _ = deltas(regression(rule)(ExactStudent(teacher), teacher), data(teacher, 512))
            assert float(delta.detach().abs().max()) < 0.02
    student = ExactStudent(teacher)
    for rule, share in ((Split("half", clip=4.0), 1.0), (Discrete(Constant(0.5), clip=4.0), 0.5)):
        delta, x, t, r = deltas(regression(rule)(student, teacher, jump_fraction=1.0), data(teacher, 512))
        target = teacher.average_velocity(x, t, r) - share * delta.detach()
        assert float(target.abs().max()) == pytest.approx(4.0, abs=1e-12)
        assert 0.2 < float((target.abs() > 4 - 1e-9).double().mean()) < 0.8


# ------------------------------------------------------------------------------------------- data for a velocity


def score(values: Tensor) -> float:
    """A mean over its standard error."""
    return float(values.mean() / values.std() * math.sqrt(len(values)))


STATISTICAL = {
    "MeanFlow": Eulerian(),
    "improved MeanFlow": Eulerian(tangent=diagonal),
    "Modular MeanFlow": Modulated(path_derivative, Constant(0.5)),
    "Lagrangian self-distillation": Lagrangian(end_derivative),
    "SplitMeanFlow in half": Split("half"),
}


@TEACHERS
@pytest.mark.parametrize("method", STATISTICAL)
def test_from_data_means_vanish(method: str, teacher: Exact) -> None:
    """``E[Delta]``, ``E[Delta x_t]`` and ``E[Delta v]`` are zero on the diagonal and on the jumps, at four standard
    errors; a map scaled by 1.1 is rejected by the last, one shifted by 0.05 by the first. (Not so a discrete step: it
    puts the noise of ``e - x`` into the network, which is exact for affine maps alone.)"""
    batch = data(teacher, 20_000)

    def scores(scale: float = 1.0, shift: float = 0.0) -> list[float]:
        student = ExactStudent(teacher, scale)
        student.shift.data += shift
        delta, x, t, r = deltas(matching(student, STATISTICAL[method], conditional, jump_fraction=0.5), batch)
        delta = delta.detach()
        found, v = [], teacher(x, t)
        for rows in (t == r, r < t):
            if float(delta[rows].abs().max()) > 1e-9:  # self-taught jumps are exact without an average
                found += [abs(score(delta[rows] * factor[rows])) for factor in (torch.ones_like(x), x, v)]
        return found

    assert max(scores()) < 4
    assert max(scores(scale=1.1)) > 6
    assert max(scores(shift=0.05)) > 4


def test_floors_from_data() -> None:
    """What noise of ``e - x`` is left: MeanFlow, which differentiates along it, has ``s^2 sd_r^2 / sd_t^4``; with a
    tangent of its own improved MeanFlow has ``s^2 / sd_t^2`` on every jump (0.5501 at t = 0.8). Four standard
    errors."""
    n, s, t, r = 100_000, 0.6, 0.8, 0.3
    floors = {"MeanFlow": s**2 * sd(r, s) ** 2 / sd(t, s) ** 4, "improved MeanFlow": s**2 / sd(t, s) ** 2}
    assert floors == {"MeanFlow": pytest.approx(0.2239, abs=1e-4), "improved MeanFlow": pytest.approx(0.5501, abs=1e-4)}
    for method, floor in floors.items():
        objective = matching(ExactStudent(GAUSSIAN), STATISTICAL[method], pairs=at(t, r), jump_fraction=1.0)
        delta, _, _, _ = deltas(objective, data(GAUSSIAN, n))
        assert root(delta) ** 2 == pytest.approx(floor, rel=4 * math.sqrt(2 / n))


# ----------------------------------------------------------------------------------------------- controls of the rules


@TEACHERS
def test_wrong_rules_would_be_seen(teacher: Exact) -> None:
    """Each with one sign, one place or one factor wrong, at the exact map. Measured: 0.037 to 2.4; the right ones, with
    the same pieces, 1e-14."""
    batch = data(teacher, 512)
    a, b = dyadic(KEY.uniform("time", batch.index)), dyadic(KEY.uniform("second_time", batch.index))
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    q = (t + 3 * r) / 4  # lambda = 3/4
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    x = teacher.flow_map(double_noise(batch, KEY), one, t)
    gap = expand(t - r, x)
    student = ExactStudent(teacher)

    def derivative(v: Tensor, dt: Tensor, dr: Tensor) -> Tensor:
        return torch.func.jvp(lambda *places: student(*places), (x, t, r), (v, dt, dr))[1].detach()

    u, v, X = teacher.average_velocity(x, t, r), teacher(x, t), teacher.flow_map(x, t, r)
    du_dt, du_dr = derivative(v, one, zero), derivative(0 * x, zero, one)
    first, x_q = teacher.average_velocity(x, t, q), teacher.flow_map(x, t, q)
    second = teacher.average_velocity(x_q, q, r)
    for right in (
        u - (v - gap * du_dt),
        u - gap * du_dr - teacher(X, r),
        u - (0.75 * first + 0.25 * second),
    ):
        assert root(right) < 1e-12
    wrong = {
        "no derivative": u - v,
        "its sign": u - (v + gap * du_dt),
        "not times the jump": u - (v - du_dt),
        "a tangent without time": u - (v - gap * derivative(v, zero, zero)),
        "a tangent without space": u - (v - gap * derivative(0 * x, one, zero)),
        "a tangent of both times": u - (v - gap * derivative(v, one, one)),
        "a tangent backwards": u - (v - gap * derivative(-v, one, zero)),
        "no derivative at the end": u - teacher(X, r),
        "its sign at the end": u + gap * du_dr - teacher(X, r),
        "the velocity of the start": u - gap * du_dr - v,
        "the end at the wrong time": u - gap * du_dr - teacher(X, t),
        "the wrong end": u - gap * du_dr - teacher(x, r),
        "shares swapped": u - (0.25 * first + 0.75 * second),
        "the second from the start": u - (0.75 * first + 0.25 * teacher.average_velocity(x, q, r)),
        "the second from beyond": u - (0.75 * first + 0.25 * teacher.average_velocity(2 * x - x_q, q, r)),
    }
    for name, delta in wrong.items():
        assert root(delta) > 0.03, name
