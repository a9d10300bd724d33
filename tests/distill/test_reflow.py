"""Rectified flow: what is straight and what is not, in closed form; windows; other predictions; sampling."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from family import GAUSSIAN, KEY, LINE, dyadic
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.jumps import jump_target, solve
from fewstep.distill.reflow.objective import PseudoHuber, Reflow, nodes, pair_straightness
from fewstep.distill.reflow.windows import PiecewiseReflow
from fewstep.evaluation.transport import straightness
from fewstep.flow import COSINE, LINEAR, PATHS, VelocityField, expand, uniform_grid
from fewstep.keys import Key
from fewstep.sampling import FieldSampler, ServedField, sample_fixed_noise, sample_ode
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.network import NetworkField
from fewstep.times import uniform

COUNT = 48
INDEX = torch.arange(COUNT)
ONE, ZERO = torch.ones(COUNT), torch.zeros(COUNT)
COV = torch.tensor([[1.0, 0.6, 0.1], [0.6, 0.8, -0.2], [0.1, -0.2, 0.3]], dtype=torch.float64)
MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
SPEC = ((0.3, 0.7), (-1.5, 1.0), (0.4, 0.25))
PLANE = GaussianTeacher.from_covariance(MEAN, COV)


def noise(dim: int, purpose: str = "noise") -> Tensor:
    return KEY.normal(purpose, INDEX, (dim,)).double()


class Straight(nn.Module):
    """The velocity whose paths are the lines ``(1 - t) T(e) + t e`` of a map ``T``: ``ends(x, t)`` are ``e, T(e)`` of
    the line through ``x``."""

    def __init__(self, ends: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        assert torch.equal(t_B, r_B)
        e, data = self.ends(x, t_B)
        return e - data


def gaussian_case() -> tuple[Tensor, Tensor, Straight]:
    """Pairs of a Gaussian flow in three dimensions, whose map is ``m + Sigma^(1/2) e``, by numpy's eigenvectors."""
    values, vectors = np.linalg.eigh(COV.numpy())
    root = torch.from_numpy(vectors @ np.diag(values**0.5) @ vectors.T)

    def ends(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t = t_B.double()[:, None, None]
        matrix = (1 - t) * root + t * torch.eye(3, dtype=torch.float64)
        e = torch.linalg.solve(matrix, (x - (1 - t[:, 0]) * MEAN)[..., None])[..., 0]
        return e, MEAN + e @ root

    e = noise(3)
    x = PLANE.flow_map(e, ONE, ZERO)
    torch.testing.assert_close(x, MEAN + e @ root, rtol=1e-12, atol=1e-12)
    return x, e, Straight(ends)


def line_case() -> tuple[Tensor, Tensor, Straight]:
    """Pairs of the two-component mixture on the line: the map is monotone, so the lines between its ends do not cross.
    The line through a point is found by halving its end at the data, where ``e = Phi^-1(F(x))`` in closed form."""

    def source(data: Tensor) -> Tensor:
        lower, upper = (
            sum(w / 2 * torch.special.erfc(side * (m - data) / (s * 2**0.5)) for w, m, s in zip(*SPEC, strict=True))
            for side in (1, -1)
        )
        return torch.where(lower < upper, torch.special.ndtri(lower), -torch.special.ndtri(upper))

    def ends(x: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        t = t_B.double()[:, None]
        low, high = torch.full_like(x, -4.0), torch.full_like(x, 4.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = (1 - t) * middle + t * source(middle) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return source(low), low

    e = noise(1)
    return LINE.flow_map(e, ONE, ZERO), e, Straight(ends)


CASES = pytest.mark.parametrize("case", [gaussian_case, line_case], ids=["gaussian", "line"])


def pairs_of(x: Tensor, e: Tensor, label: Tensor | None = None) -> Batch:
    return Batch(x, label, INDEX, noise=e)


# ------------------------------------------------------------------------------------------------------- straightness


@CASES
def test_one_reflow_is_straight(case) -> None:
    """Where lines between paired ends do not cross: residual at rounding, every sample at every time; one Euler step,
    four, and the fixed noise end where the pair does."""
    x, e, student = case()
    output = Reflow(student, times=dyadic)(pairs_of(x, e), KEY)
    assert float(output.residual_B.max()) < 1e-20
    assert torch.equal(output.per_sample_B, output.residual_B)
    field = NetworkField(student)
    assert pair_straightness(field, x, e) < 1e-20
    assert straightness(field, e) < 1e-12  # times of its grid are float32
    for rule in ("euler", "heun", "midpoint", "fixed_noise"):
        for steps in (1, 4):
            found = FieldSampler((ServedField(field),), rule)(steps, e, None, KEY, INDEX)
            torch.testing.assert_close(found.x, x, rtol=1e-11, atol=1e-11)
            assert found.nfe == steps * (2 if rule in ("heun", "midpoint") else 1)


@CASES
def test_independent_pairs_are_not_straight(case) -> None:
    """The control: the same ends paired at random, under the same student and under the flow's own velocity."""
    x, e, student = case()
    teacher = PLANE if x.shape[1] == 3 else LINE
    shuffled = pairs_of(x, e.roll(1, dims=0))
    assert float(Reflow(student, times=dyadic)(shuffled, KEY).residual_B.mean()) > 0.1
    assert pair_straightness(teacher, x, e.roll(1, dims=0)) > 0.1
    # Nor is the teacher's own flow on its own pairs: that is what a reflow is for.
    assert pair_straightness(teacher, x, e) > 1e-3


def test_straightness_of_independent_pairs_in_closed_form() -> None:
    """On a Gaussian ``E |(e - x) - v|^2 = s^2 / sd_t^2``, whose mean over t is ``s pi / 2`` for noise of variance one:
    the integral of ``s^2 / ((1-t)^2 s^2 + t^2)``."""
    index = torch.arange(200_000)
    e, x = KEY.normal("e", index, (1,)), GAUSSIAN.sample(Key(1), index, (1,))
    assert pair_straightness(GAUSSIAN, x, e, times=64) == pytest.approx(0.6 * math.pi / 2, rel=1e-2)


def test_straightness_weighs_all_times_alike() -> None:
    """Of a velocity that is wrong by ``t`` everywhere: the mean of ``t^2``, by the middle of each part."""
    x, e, student = gaussian_case()

    def field(x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return student(x, t_B, t_B) + t_B[:, None]

    assert pair_straightness(field, x, e, times=100) == pytest.approx(1 / 3 - 1 / (12 * 100**2), rel=1e-5)


def test_distillation_looks_at_the_nodes_of_its_steps() -> None:
    """From 1 down to 1/N, equally often; one step knows ``t = 1`` alone, where the state is the noise."""
    u = (torch.arange(1200, dtype=torch.float64) + 0.5) / 1200
    assert nodes(3)(u).unique().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert [int((nodes(3)(u) == node).sum()) for node in nodes(3)(u).unique()] == [400, 400, 400]
    x, e, student = gaussian_case()
    seen: list[tuple[Tensor, Tensor]] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
            seen.append((x, t))
            return student(x, t, r) + 0.5

    output = Reflow(Noted(), times=nodes(1))(pairs_of(x, e), KEY)
    assert torch.equal(seen[0][0], e)
    assert torch.equal(seen[0][1], ONE)
    torch.testing.assert_close(output.residual_B, torch.full((COUNT,), 0.25, dtype=torch.float64))


def test_noise_and_label_are_those_of_the_pair() -> None:
    x, e, _ = gaussian_case()
    label = INDEX % 4
    seen: list[Tensor | None] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
            seen.append(label)
            return torch.zeros_like(x)

    output = Reflow(Noted())(pairs_of(x, e, label), KEY)
    assert torch.equal(seen[0], label)
    torch.testing.assert_close(output.residual_B, (e - x).square().mean(1))
    with pytest.raises(ValueError, match="no noise of their own"):
        Reflow(Noted())(Batch(x, label, INDEX), KEY)


# ---------------------------------------------------------------------------------------------------------- the losses


def test_the_robust_loss() -> None:
    """By its own formula, in float64: c is in proportion to the number of coordinates, and the loss is per coordinate;
    quadratic below c, the length over D far above it."""
    deviation = torch.randn(16, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (5.4e-4, 0.1):
        c = scale * 20
        square = deviation.flatten(1).square().sum(1)
        torch.testing.assert_close(PseudoHuber(scale)(deviation), ((square + c**2).sqrt() - c) / 20)
    tiny, huge = PseudoHuber(0.1)(1e-6 * deviation), PseudoHuber(0.1)(1e6 * deviation)
    torch.testing.assert_close(tiny, 1e-12 * square / (2 * 2.0) / 20, rtol=1e-6, atol=0)
    torch.testing.assert_close(huge, 1e6 * square.sqrt() / 20, rtol=1e-5, atol=0)
    assert float(PseudoHuber(5.4e-4)(torch.full((1, 20), 1e-4))) > 0  # in float32 a difference would cancel


class Affine(nn.Module):
    """Some velocity that is not the right one."""

    def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        return 0.3 * x - expand(t, x) * 0.7 + 0.1


def test_the_weight_falls_towards_noise() -> None:
    x, e, _ = gaussian_case()
    flat, falling = (Reflow(Affine(), times=dyadic, falling=each)(pairs_of(x, e), KEY) for each in (False, True))
    torch.testing.assert_close(falling.per_sample_B, flat.per_sample_B * (1 - flat.t_B))
    assert torch.equal(falling.residual_B, flat.residual_B)


@pytest.mark.parametrize("path", ["linear", "cosine", "variance_preserving"])
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise"])
def test_other_predictions_are_the_literal_regressions(path: str, prediction: str) -> None:
    """On the path's own state, with the network's answer converted by the path's own formulas. To the precision of
    float32 times."""
    x, e, _ = gaussian_case()
    chosen = PATHS[path]
    output = Reflow(Affine(), path=chosen, prediction=prediction)(pairs_of(x, e), KEY)
    time = KEY.uniform("time", INDEX)
    point = chosen.sample(x, e, time)
    s = chosen.linear_time(time)
    x_s = point.x_t / expand(chosen.scale(time), x)
    v = chosen.velocity_from_linear(x_s, Affine()(x_s, s, s), time)
    found, wanted = {
        "velocity": (v, point.v),
        "data": (chosen.data_from_velocity(point.x_t, v, time), x),
        "noise": (chosen.noise_from_velocity(point.x_t, v, time), e),
    }[prediction]
    torch.testing.assert_close(output.per_sample_B, (found - wanted).square().mean(1), rtol=1e-4, atol=1e-6)


def test_first_order_paths_are_straight_lines() -> None:
    """Rectified Diffusion's target of a window: ``(y_E - y_S) / (sigma_E - sigma_S)`` with ``y = x / (1 - t)`` is the
    noise that the chord points at, ``x_S + (1 - S) v*``; and with ideal pairs any path's prediction is constant."""
    start = torch.linspace(0.3, 0.95, COUNT, dtype=torch.float64)
    end = start - torch.linspace(0.05, 0.29, COUNT, dtype=torch.float64)
    x_start, x_end = noise(3), noise(3, "end")
    target = jump_target(x_start, x_end, start, end)
    y_start, y_end = x_start / (1 - start[:, None]), x_end / (1 - end[:, None])
    sigma_start, sigma_end = start / (1 - start), end / (1 - end)
    eps = (y_end - y_start) / (sigma_end - sigma_start)[:, None]
    torch.testing.assert_close(eps, x_start + (1 - start[:, None]) * target, rtol=1e-11, atol=1e-11)
    x, e, student = gaussian_case()
    for prediction in ("velocity", "data", "noise"):
        output = Reflow(student, path=COSINE, prediction=prediction)(pairs_of(x, e), KEY)
        assert float(output.per_sample_B.max()) < 1e-11  # float32 times


# ------------------------------------------------------------------------------------------------------------- windows


class Chords(nn.Module):
    """The exact student of ``windows`` windows with one Euler substep each, for an affine teacher on the line: from
    ``x_t`` back to the start of its window, where the teacher is asked."""

    def __init__(self, teacher: VelocityField, windows: int) -> None:
        super().__init__()
        self.teacher, self.windows = teacher, windows

    def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        start = (t.double() * self.windows).ceil() / self.windows
        at_zero = self.teacher(torch.zeros_like(x), start)
        slope = self.teacher(torch.ones_like(x), start) - at_zero
        back = (t.double() - start)[:, None]
        return self.teacher((x - back * at_zero) / (1 + back * slope), start)


def windowed(student: nn.Module, windows: int, substeps: int = 1, solver: str = "euler", **rest) -> PiecewiseReflow:
    rest.setdefault("noise", lambda batch, key: key.normal("noise", batch.index, tuple(batch.x.shape[1:])).double())
    return PiecewiseReflow(student, teacher=GAUSSIAN, windows=windows, solver=solver, substeps=substeps, **rest)


def line_data() -> Batch:
    return Batch(GAUSSIAN.sample(Key(1), INDEX, (1,)).double(), None, INDEX)


@pytest.mark.parametrize("windows", [1, 2, 4, 8])
def test_windows_of_one_substep_are_the_euler_teacher(windows: int) -> None:
    """The residual vanishes at the exact student, whose K steps, and 2K, are the teacher's K Euler steps."""
    student = Chords(GAUSSIAN, windows)
    output = windowed(student, windows)(line_data(), KEY)
    assert float(output.residual_B.max()) < 1e-24
    assert float(output.diagnostics["misalignment"].max()) < 1e-12
    e = noise(1)
    sampler = FieldSampler((ServedField(NetworkField(student), windows, multiples=True),))
    wanted = sample_ode(GAUSSIAN, e, uniform_grid(windows)).x
    for steps in (windows, 2 * windows):
        torch.testing.assert_close(sampler(steps, e, None, KEY, INDEX).x, wanted, rtol=1e-12, atol=1e-12)
    assert windows == 8 or float(windowed(student, 2 * windows)(line_data(), KEY).residual_B.mean()) > 1e-4


@pytest.mark.parametrize(("solver", "substeps"), [("euler", 3), ("heun", 2)])
def test_substeps_are_the_teachers_steps_through_the_window(solver: str, substeps: int) -> None:
    """States and targets as a loop over windows finds them, from data noised to the start of each."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
            seen.append((x, t))
            return torch.zeros_like(x)

    batch = line_data()
    output = windowed(Noted(), 4, substeps, solver)(batch, KEY)
    ((x_t, t),) = seen
    e = KEY.normal("noise", INDEX, (1,)).double()
    assert len({int(each * 4) for each in t}) == 4
    for row in range(COUNT):
        start = math.ceil(float(t[row]) * 4) / 4
        x = (1 - start) * batch.x[row : row + 1] + start * e[row : row + 1]
        grid = torch.linspace(start, start - 0.25, substeps + 1)
        end = x
        for a, b in pairwise(grid):
            end = solve(GAUSSIAN, solver, end, a[None], b[None])
        chord = (x - end) / 0.25
        torch.testing.assert_close(output.residual_B[row], chord.square().mean(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(x_t[row], (x + (float(t[row]) - start) * chord)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_rows_is_where_a_window_starts(share: float) -> None:
    """There the state is the noised data itself; the other rows are anywhere in their window, evenly."""
    index = torch.arange(4000)
    batch = Batch(GAUSSIAN.sample(Key(1), index, (1,)).double(), None, index)
    output = windowed(Chords(GAUSSIAN, 4), 4, start_share=share)(batch, KEY)
    place = output.t_B.double() * 4
    starts = place == place.round()
    assert float(starts.double().mean()) == pytest.approx(share, abs=0.03)
    within = (place - place.floor())[~starts]
    assert float(within.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(within.min()) < 0.02
    assert float(output.residual_B.max()) < 1e-24
    assert {int(each) for each in (place[starts]).unique()} == ({1, 2, 3, 4} if share else set())


def test_without_direction_progressive_reflow_is_piecewise_reflow() -> None:
    """To the bit, loss and gradient; with a weight, ``1 - cos`` comes on top."""
    teacher = PLANE
    batch = Batch(PLANE.sample(Key(1), INDEX, (3,)).double(), None, INDEX)

    def output(**rest):
        student = nn.Linear(3, 3).double()
        nn.init.eye_(student.weight)
        nn.init.zeros_(student.bias)
        net = nn.Module()
        net.forward = lambda x, t, r, label: student(x)
        found = replace_teacher(windowed(net, 4, **rest), teacher)(batch, KEY)
        found.per_sample_B.mean().backward()
        return found, student.weight.grad

    plain, gradient = output()
    zero, same = output(direction=0.0)
    aligned, other = output(direction=0.3)
    assert torch.equal(plain.per_sample_B, plain.residual_B)
    assert torch.equal(zero.per_sample_B, plain.per_sample_B)
    assert torch.equal(same, gradient)
    away = aligned.diagnostics["misalignment"]
    assert float(away.max()) > 0.1
    torch.testing.assert_close(aligned.per_sample_B, plain.per_sample_B + 0.3 * away)
    assert not torch.equal(other, gradient)


def replace_teacher(objective: PiecewiseReflow, teacher: VelocityField) -> PiecewiseReflow:
    objective.teacher = teacher
    return objective


def test_alignment_is_a_cosine() -> None:
    """Of opposite velocities 2, of the same direction at any speed 0."""
    batch = line_data()
    for factor, wanted in ((-2.0, 2.0), (3.0, 0.0)):

        class Scaled(Chords):
            def forward(self, *rest, factor=factor) -> Tensor:
                return factor * super().forward(*rest)

        output = windowed(Scaled(GAUSSIAN, 4), 4)(batch, KEY)
        torch.testing.assert_close(
            output.diagnostics["misalignment"], torch.full((COUNT,), wanted, dtype=torch.float64), atol=1e-7, rtol=0
        )


def test_the_teacher_is_asked_for_the_class() -> None:
    seen = []

    def teacher(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        seen.append(label)
        return torch.zeros_like(x)

    label = INDEX % 3
    objective = replace_teacher(windowed(Chords(GAUSSIAN, 4), 4), teacher)
    objective(replace(line_data(), label=label), KEY)
    assert seen
    assert all(torch.equal(each, label) for each in seen)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_fixed_noise_by_hand() -> None:
    """Four steps of a curved flow: each goes to the line between its data prediction and the first noise."""
    e = noise(1)
    x = e
    for t in (1.0, 0.75, 0.5, 0.25):
        data = x - t * GAUSSIAN(x, torch.full((COUNT,), t))
        x = (1.25 - t) * data + (t - 0.25) * e
    found = sample_fixed_noise(GAUSSIAN, e, uniform_grid(4))
    torch.testing.assert_close(found.x, x, rtol=1e-12, atol=1e-12)
    assert found.nfe == 4
    euler = sample_ode(GAUSSIAN, e, uniform_grid(3)).x
    assert float((sample_fixed_noise(GAUSSIAN, e, uniform_grid(3)).x - euler).abs().max()) > 1e-2
    with pytest.raises(ValueError, match=r"begins at 0\.75"):
        sample_fixed_noise(GAUSSIAN, e, uniform_grid(4)[1:])


def constant(value: float) -> VelocityField:
    class Constant(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
            return torch.full_like(x, value)

    return NetworkField(Constant())


def test_which_field_serves_which_steps() -> None:
    """One made for exactly these, else the finest whose windows divide them, else one for any number."""
    both = FieldSampler((ServedField(constant(1.0)), ServedField(constant(2.0), 1)), "heun")
    e = torch.zeros(COUNT, 1)
    for steps, value, nfe in ((1, 2.0, 1), (2, 1.0, 4), (7, 1.0, 14)):
        found = both(steps, e, None, KEY, INDEX)
        assert (float(-found.x[0, 0]), found.nfe) == (pytest.approx(value), nfe)
    assert both.name == "heun"
    windows = FieldSampler(tuple(ServedField(constant(float(k)), k, multiples=True) for k in (8, 4)))
    for steps, value in ((4, 4.0), (8, 8.0), (12, 4.0), (16, 8.0)):
        assert float(-windows(steps, e, None, KEY, INDEX).x[0, 0]) == pytest.approx(value)
    assert windows.name == "euler"
    with pytest.raises(ValueError, match="4 steps and multiples, 8 steps and multiples, not for 6 steps"):
        windows.check(6)
    exact = FieldSampler((ServedField(constant(1.0), 3),))
    exact.check(3)
    with pytest.raises(ValueError, match="trained for 3, not for 6 steps"):
        exact.check(6)


def test_uniform_times_are_the_default() -> None:
    x, e, _ = gaussian_case()
    output = Reflow(Affine())(pairs_of(x, e), KEY)
    assert torch.equal(output.t_B, uniform(KEY.uniform("time", INDEX)).float())
    assert torch.equal(output.t_B, LINEAR.linear_time(output.t_B))
