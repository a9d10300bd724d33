"""Analytic teachers against an independent oracle, the three characterisations of a flow map, and their own data.

Float64 throughout except where said. Velocities and maps are of order one, so ``1e-12`` is some thousand roundings.
"""

import math
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fewstep.data.toys import EIGHT_GAUSSIANS, MIXTURE_1D, MixtureSpec, eight_gaussians
from fewstep.flow import FlowMap, VelocityField
from fewstep.keys import Key
from fewstep.teachers.analytic import ExactMap, GaussianTeacher, MixtureTeacher

EXACT = {"rtol": 0.0, "atol": 1e-12}
TIMES = (0.0, 0.03, 0.3, 0.5, 0.8, 1.0)
JUMPS = ((1.0, 0.0), (1.0, 0.6), (0.7, 0.2), (0.4, 0.0), (0.0, 1.0), (0.3, 0.8))

SOLVER = MixtureSpec(weights=(0.3, 0.7), means=((-1.5,), (1.0,)), stds=(0.4, 0.25))
PLANE = MixtureSpec(weights=(0.2, 0.5, 0.3), means=((-1, 0.5), (0.3, -0.8), (1, 1)), stds=(0.3, 0.5, 0.2))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, dtype=torch.float64)


def arrays(spec: MixtureSpec) -> list[np.ndarray]:
    return [parameter.numpy() for parameter in spec.tensors()]


def random_covariance(dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    """A full covariance with its rotation and the stds along the rotated axes (two of them equal)."""
    rotation, _ = torch.linalg.qr(normal(dimensions, dimensions, seed=3))
    std = torch.tensor([0.2, 0.7, 0.7, 1.6], dtype=torch.float64)[:dimensions]
    return rotation @ torch.diag(std**2) @ rotation.mT, rotation, std


GAUSSIAN_MEAN = torch.tensor([0.4, -1.0, 0.2, 2.0], dtype=torch.float64)
FULL = GaussianTeacher.from_covariance(GAUSSIAN_MEAN, random_covariance(4)[0])
LINE = MixtureTeacher.from_spec(SOLVER)

# What each teacher's flow map is tried on: points that the flow itself visits, [B, D] at time t.
WITH_A_MAP: dict[str, tuple[GaussianTeacher | MixtureTeacher, Tensor]] = {
    "gaussian": (GaussianTeacher(0.4, 0.6), normal(50, 3)),
    "full covariance": (FULL, normal(50, 4)),
    "mixture": (LINE, torch.linspace(-3.5, 3.5, 71, dtype=torch.float64)[:, None]),
    "three components": (MixtureTeacher.from_spec(MIXTURE_1D), torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]),
}
EVERY_MAP = pytest.mark.parametrize("name", WITH_A_MAP)


def on_the_flow(name: str, t: float) -> tuple[GaussianTeacher | MixtureTeacher, Tensor]:
    teacher, e = WITH_A_MAP[name]
    return teacher, teacher.flow_map(e, at(1.0, e), at(t, e))


# ------------------------------------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("t", TIMES)
def test_gaussian_velocity(t: float) -> None:
    x = 2 * normal(40, 1)
    wanted = oracle.gaussian_velocity(x.numpy(), t, 0.7, 0.35)
    torch.testing.assert_close(GaussianTeacher(0.7, 0.35)(x, at(t, x)), torch.from_numpy(wanted), **EXACT)


@pytest.mark.parametrize("t", TIMES)
def test_full_gaussian_velocity(t: float) -> None:
    x = 2 * normal(40, 4)
    cov = random_covariance(4)[0]
    wanted = oracle.gaussian_velocity_full(x.numpy(), t, GAUSSIAN_MEAN.numpy(), cov.numpy())
    torch.testing.assert_close(FULL(x, at(t, x)), torch.from_numpy(wanted), **EXACT)


@pytest.mark.parametrize(("t", "r"), JUMPS)
def test_gaussian_map_and_average_velocity(t: float, r: float) -> None:
    x = 2 * normal(40, 1)
    teacher = GaussianTeacher(-0.3, 0.5)
    X = oracle.gaussian_map(x.numpy(), t, r, -0.3, 0.5)
    u = oracle.gaussian_average_velocity(x.numpy(), t, r, -0.3, 0.5)
    torch.testing.assert_close(teacher.flow_map(x, at(t, x), at(r, x)), torch.from_numpy(X), **EXACT)
    torch.testing.assert_close(teacher.average_velocity(x, at(t, x), at(r, x)), torch.from_numpy(u), **EXACT)


@pytest.mark.parametrize("t", TIMES)
def test_mixture_velocity(t: float) -> None:
    x = normal(60, 2)
    wanted = oracle.mixture_velocity(x.numpy(), t, *arrays(PLANE))
    torch.testing.assert_close(MixtureTeacher.from_spec(PLANE)(x, at(t, x)), torch.from_numpy(wanted), **EXACT)


@pytest.mark.parametrize("t", [0.3, 0.8, 1.0])
def test_mixture_velocity_by_quadrature(t: float) -> None:
    """Bayes' rule integrated over the data, where neither scores nor components appear."""
    x = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]
    w, m, s = arrays(SOLVER)
    wanted = oracle.mixture_velocity_quadrature(x[:, 0].numpy(), t, w, m[:, 0], s)
    torch.testing.assert_close(LINE(x, at(t, x))[:, 0], torch.from_numpy(wanted), **EXACT)


@pytest.mark.parametrize(("t", "r"), JUMPS)
def test_mixture_map(t: float, r: float) -> None:
    teacher, x = on_the_flow("mixture", t)
    w, m, s = arrays(SOLVER)
    wanted = torch.from_numpy(oracle.mixture_map(x[:, 0].numpy(), t, r, w, m[:, 0], s))
    torch.testing.assert_close(teacher.flow_map(x, at(t, x), at(r, x))[:, 0], wanted, **EXACT)


@pytest.mark.parametrize(("t", "r"), [(1.0, 0.0), (0.2, 0.9)])
def test_maps_solve_the_ode(t: float, r: float) -> None:
    """Runge-Kutta with 400 steps on the oracle's velocity, whose own error is what remains (8e-10 for the mixture)."""
    _, x = on_the_flow("mixture", t)
    w, m, s = arrays(SOLVER)
    wanted = oracle.rk4(lambda y, time: oracle.mixture_velocity(y, time, w, m, s), x.numpy(), t, r, 400)
    torch.testing.assert_close(LINE.flow_map(x, at(t, x), at(r, x)), torch.from_numpy(wanted), rtol=0, atol=5e-9)

    _, x = on_the_flow("full covariance", t)
    mean, cov = GAUSSIAN_MEAN.numpy(), random_covariance(4)[0].numpy()
    wanted = oracle.rk4(lambda y, time: oracle.gaussian_velocity_full(y, time, mean, cov), x.numpy(), t, r, 400)
    torch.testing.assert_close(FULL.flow_map(x, at(t, x), at(r, x)), torch.from_numpy(wanted), rtol=0, atol=5e-9)


# ----------------------------------------------------------------------------- the three characterisations of the map


@EVERY_MAP
@pytest.mark.parametrize(("t", "r"), [(1.0, 0.0), (0.9, 0.3), (0.5, 0.45), (0.4, 0.0)])
def test_three_characterisations(name: str, t: float, r: float) -> None:
    """Of the average velocity u and the map X, with tangents in the order (x, t, r).

    Measured: 4e-15, on Gaussians and mixtures alike.
    """
    teacher, x = on_the_flow(name, t)
    t_B, r_B, gap, one = at(t, x), at(r, x), t - r, torch.ones(len(x), dtype=torch.float64)
    v = teacher(x, t_B)

    # Eulerian: u = v(x, t) - (t - r) du/dt along the flow.
    u, du = jvp(lambda x, t: teacher.average_velocity(x, t, r_B), (x, t_B), (v, one))
    torch.testing.assert_close(u, v - gap * du, **EXACT)

    # Lagrangian: u - (t - r) du/dr = v(X, r) with X = x - (t - r) u.
    u, du = jvp(lambda r: teacher.average_velocity(x, t_B, r), (r_B,), (one,))
    torch.testing.assert_close(u - gap * du, teacher(x - gap * u, r_B), **EXACT)

    # Semigroup: the displacement over [r, t] is the sum of those over [q, t] and [r, q].
    q = 0.3 * t + 0.7 * r
    first = (t - q) * teacher.average_velocity(x, t_B, at(q, x))
    second = (q - r) * teacher.average_velocity(x - first, at(q, x), r_B)
    torch.testing.assert_close(gap * u, first + second, **EXACT)


@EVERY_MAP
def test_identity_and_displacement(name: str) -> None:
    """X(x, t, t) = x, and X = x - (t - r) u."""
    teacher, x = on_the_flow(name, 0.6)
    t_B, r_B = at(0.6, x), at(0.1, x)
    torch.testing.assert_close(teacher.flow_map(x, t_B, t_B), x, **EXACT)
    u = teacher.average_velocity(x, t_B, r_B)
    torch.testing.assert_close(teacher.flow_map(x, t_B, r_B), x - 0.5 * u, **EXACT)


@EVERY_MAP
@pytest.mark.parametrize("t", TIMES)
def test_average_velocity_on_the_diagonal_is_the_velocity(name: str, t: float) -> None:
    teacher, x = on_the_flow(name, t)
    torch.testing.assert_close(teacher.average_velocity(x, at(t, x), at(t, x)), teacher(x, at(t, x)), **EXACT)


def test_gaussian_average_velocity_does_not_cancel() -> None:
    """Over a gap of 1e-9 the difference quotient keeps 7 digits, the closed form all but one:
    u = v - gap/2 Dv/Dt + O(gap^2) with Dv/Dt = s^2 / sd_t^4 (x - mu_t)."""
    x, gap, t, m, s = normal(40, 1), 1e-9, 0.4, 0.3, 0.5
    teacher = GaussianTeacher(m, s)
    acceleration = s**2 / oracle.gaussian_sd(t, s) ** 4 * (x - (1 - t) * m)
    u = teacher.average_velocity(x, at(t, x), at(t - gap, x))
    torch.testing.assert_close(u, teacher(x, at(t, x)) - gap / 2 * acceleration, rtol=0, atol=1e-14)


def test_mixture_map_has_gradients_in_reverse_too() -> None:
    """dX/dx = p_t(x) / p_r(X): positive, and equal to the ratio of densities by finite differences of the map."""
    teacher, x = on_the_flow("mixture", 0.8)
    x.requires_grad_()
    X = teacher.flow_map(x, at(0.8, x), at(0.3, x))
    (slope,) = torch.autograd.grad(X.sum(), x)
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (teacher.flow_map(x + d, at(0.8, x), at(0.3, x)) for d in (h, -h))
    assert slope.min() > 0
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-7, atol=0)


# --------------------------------------------------------------------------------------- the velocity as a regression


def regression_z(
    teacher: VelocityField, x: Tensor, e: Tensor, t: float, label_B: Tensor | None = None
) -> dict[str, float]:
    """How many standard errors E[(e - x - v(x_t, t)) phi(x_t)] is away from zero, the worst coordinate for each phi.

    The conditional expectation v(x_t) = E[e - x | x_t] is the function for which all of these vanish.
    """
    t_B = at(t, x)
    x_t = (1 - t) * x + t * e
    residual = e - x - teacher(x_t, t_B, label_B)
    probes: dict[str, Callable[[Tensor], Tensor]] = {
        "1": torch.ones_like,
        "x": lambda y: y,
        "x^2": lambda y: y**2,
        "sin 3x": lambda y: torch.sin(3 * y),
        "sin 7x": lambda y: torch.sin(7 * y),
        "other coordinate": lambda y: y.roll(1, dims=1),
    }
    scores = {}
    for name, phi in probes.items():
        product = residual * phi(x_t)
        scores[name] = (product.mean(0).abs() / product.std(0) * math.sqrt(len(x))).max().item()
    return scores


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 1.0])
def test_velocity_is_the_regression_of_its_own_data(t: float) -> None:
    """Within 4.5 standard errors of 200 000 draws; a teacher of slightly other data is not."""
    index = torch.arange(200_000)
    teacher = MixtureTeacher.from_spec(PLANE)
    x, e = teacher.sample(Key(1), index).double(), Key(1).normal("e", index, (2,)).double()
    assert max(regression_z(teacher, x, e, t).values()) < 4.5

    weights, means, stds = PLANE.tensors()
    assert max(regression_z(MixtureTeacher(weights, means + 0.02, stds), x, e, t).values()) > 5
    if t < 0.9:  # near t = 1 little more than the mean of the data is left in the velocity
        assert max(regression_z(MixtureTeacher(weights, means, 1.1 * stds), x, e, t).values()) > 5


def test_gaussian_velocity_is_the_regression_of_its_own_data() -> None:
    index = torch.arange(200_000)
    x, e = FULL.sample(Key(1), index, (4,)).double(), Key(1).normal("e", index, (4,)).double()
    covariance = torch.cov(x.mT)
    assert (x.mean(0) - GAUSSIAN_MEAN).abs().max() < 4 * 1.6 / math.sqrt(len(x))
    assert (covariance - random_covariance(4)[0]).abs().max() < 4 * math.sqrt(2 / len(x)) * 1.6**2
    assert max(regression_z(FULL, x, e, 0.6).values()) < 4.5
    diagonal = GaussianTeacher(GAUSSIAN_MEAN, random_covariance(4)[0].diagonal().sqrt())
    assert max(regression_z(diagonal, x, e, 0.6).values()) > 20


def test_irreducible_loss() -> None:
    """E[(e - x - v)^2] = s^2 / sd_t^2: 0.5501 at s = 0.6, t = 0.8 (a chi-square, standard error sqrt(2/N) of it)."""
    index, s, t = torch.arange(200_000), 0.6, 0.8
    teacher = GaussianTeacher(0.5, s)
    x, e = teacher.sample(Key(2), index, (1,)).double(), Key(2).normal("e", index, (1,)).double()
    loss = (e - x - teacher((1 - t) * x + t * e, at(t, x))).square().mean().item()
    assert loss == pytest.approx(0.5501, rel=4 * math.sqrt(2 / len(index)))


# -------------------------------------------------------------------------------------------- ends, shapes, precision


@pytest.mark.parametrize("spec", [SOLVER, PLANE, EIGHT_GAUSSIANS])
def test_mixture_velocity_at_both_ends(spec: MixtureSpec) -> None:
    """v(x, 0) = -x whatever the data, v(x, 1) = x - E[data]; continuous there, and finite far from everything."""
    teacher = MixtureTeacher.from_spec(spec)
    weights, means, _ = spec.tensors()
    x = normal(50, means.shape[1])
    torch.testing.assert_close(teacher(x, at(0.0, x)), -x, **EXACT)
    torch.testing.assert_close(teacher(x, at(1.0, x)), x - weights @ means, **EXACT)
    for end, inside in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        torch.testing.assert_close(teacher(x, at(inside, x)), teacher(x, at(end, x)), rtol=0, atol=1e-5)
    for t in TIMES:
        assert teacher(1e6 * x, at(t, x)).isfinite().all()
        assert teacher(1e6 * x.float(), at(t, x).float()).isfinite().all()


@pytest.mark.parametrize("s", [0.25, 0.5, 1.0, 2.0])
def test_one_step_from_noise(s: float) -> None:
    """The exact jump from noise gives m + s e; an Euler step gives the mean with no spread at all."""
    e = normal(20, 2)
    teacher = GaussianTeacher(0.3, s)
    torch.testing.assert_close(teacher.flow_map(e, at(1.0, e), at(0.0, e)), 0.3 + s * e, **EXACT)
    torch.testing.assert_close(e - teacher(e, at(1.0, e)), torch.full_like(e, 0.3), **EXACT)


@pytest.mark.parametrize(
    ("steps", "frechet"), [(1, 0.25), (2, 0.09), (4, 0.02543), (8, 0.007262), (64, 1.31e-4), (1024, 5.2e-7)]
)
def test_euler_gain(steps: int, frechet: float) -> None:
    """N Euler steps turn N(0, 1) into N(m, P_N^2) and miss data of std 1/2 by these Frechet distances."""
    assert oracle.euler_frechet(steps, 0.5) == pytest.approx(frechet, rel=6e-3)
    e = normal(10, 1)
    teacher, x = GaussianTeacher(0.3, 0.5), e
    for n in range(steps, 0, -1):
        x = x - teacher(x, at(n / steps, x)) / steps
    torch.testing.assert_close(x, 0.3 + oracle.euler_gain(steps, 0.5) * e, **EXACT)


def test_full_covariance_is_a_rotated_diagonal() -> None:
    """Rotate the axes: v(R y) = R v'(y), X(R y) = R X'(y), u(R y) = R u'(y)."""
    _, rotation, std = random_covariance(4)
    diagonal = GaussianTeacher(rotation.mT @ GAUSSIAN_MEAN, std)
    y = normal(30, 4)
    x, t_B, r_B = y @ rotation.mT, at(0.7, y), at(0.2, y)
    torch.testing.assert_close(FULL(x, t_B), diagonal(y, t_B) @ rotation.mT, **EXACT)
    torch.testing.assert_close(FULL.flow_map(x, t_B, r_B), diagonal.flow_map(y, t_B, r_B) @ rotation.mT, **EXACT)
    torch.testing.assert_close(
        FULL.average_velocity(x, t_B, r_B), diagonal.average_velocity(y, t_B, r_B) @ rotation.mT, **EXACT
    )


def test_images_are_flattened_vectors_and_rows_have_their_own_times() -> None:
    """[B, C, H, W] in the row-major order of [B, D], for both teachers, each row at its own t and r."""
    image, t_B, r_B = normal(3, 1, 2, 2), torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.1, 0.5, 0.0]).double()
    gaussian = GaussianTeacher(GAUSSIAN_MEAN.reshape(1, 2, 2), FULL.std, FULL.basis)
    mixture = MixtureTeacher(torch.ones(2), normal(2, 4, seed=5), torch.tensor([0.3, 0.6]))
    for b in range(3):
        flat, t, r = image[b].reshape(1, 4), t_B[b : b + 1], r_B[b : b + 1]
        for whole, row in (
            (gaussian(image, t_B), FULL(flat, t)),
            (gaussian.flow_map(image, t_B, r_B), FULL.flow_map(flat, t, r)),
            (gaussian.average_velocity(image, t_B, r_B), FULL.average_velocity(flat, t, r)),
            (mixture(image, t_B), mixture(flat, t)),
        ):
            torch.testing.assert_close(whole[b].reshape(1, 4), row, **EXACT)
    _, x = on_the_flow("mixture", 0.5)
    times = torch.linspace(0, 1, len(x), dtype=torch.float64)
    X = LINE.flow_map(x, times, times.flip(0))
    for b in (0, 30, 55, 70):
        torch.testing.assert_close(
            X[b : b + 1], LINE.flow_map(x[b : b + 1], times[b : b + 1], times.flip(0)[b : b + 1]), **EXACT
        )


def test_float32_in_float32_out() -> None:
    """Single precision agrees with double to some ten of its roundings (measured 1e-6), over a gap of 0.4 in u."""
    for name in WITH_A_MAP:
        teacher, x = on_the_flow(name, 0.8)
        t_B, r_B = at(0.8, x), at(0.4, x)
        for call in (teacher.__call__, teacher.flow_map, teacher.average_velocity):
            times = (t_B,) if call == teacher.__call__ else (t_B, r_B)
            single = call(x.float(), *(time.float() for time in times))
            assert single.dtype == torch.float32
            torch.testing.assert_close(single.double(), call(x, *times), rtol=0, atol=5e-6)


def test_far_tails_are_mapped_by_the_widest_component() -> None:
    """Forty standard deviations out, where the distribution function underflows, the widest component rules."""
    x = torch.tensor([[-40.0], [40.0]], dtype=torch.float64)
    X = LINE.flow_map(x, at(1.0, x), at(0.0, x))[:, 0]
    alone = torch.tensor([-1.5 - 0.4 * 40, -1.5 + 0.4 * 40], dtype=torch.float64)
    # Its weight of 0.3 moves the quantile inwards by log(1 / 0.3) / 40 standard deviations.
    shift = 0.4 * math.log(1 / 0.3) / 40
    torch.testing.assert_close(X, alone + torch.tensor([shift, -shift]).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(LINE.flow_map(X[:, None], at(0.0, x), at(1.0, x)), x, rtol=1e-12, atol=0)


def test_an_empty_gap_is_a_jump_not_a_failure() -> None:
    """Modes 2 000 standard deviations apart: the map is finite everywhere and has finite derivatives."""
    teacher = MixtureTeacher(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.tensor([1e-3, 1e-3]))
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None].requires_grad_()
    X = teacher.flow_map(x, at(1.0, x), at(0.0, x))
    (slope,) = torch.autograd.grad(X.sum(), x)
    assert X.isfinite().all()
    assert slope.isfinite().all()
    clear = x[:, 0].abs() > 0.05
    assert ((X[clear, 0].abs() - 1).abs() < 5e-3).all()
    assert torch.equal(X[clear].sign(), x[clear].sign())
    # In the middle of the gap, where the density underflows, not even the identity has a slope by division.
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    X = teacher.flow_map(x, at(0.0, x), at(0.0, x))
    (slope,) = torch.autograd.grad(X.sum(), x)
    assert X.item() == 0
    assert slope.isfinite().all()


# ------------------------------------------------------------------------------------------------- labels and refusals


def test_a_label_selects_its_components() -> None:
    """Row by row: one component is a Gaussian, two are their own mixture, None and the null label are everything."""
    weights, means, stds = PLANE.tensors()
    weights = 7 * weights
    labelled = MixtureTeacher(weights, means, stds, torch.tensor([1, 0, 1]))
    assert labelled.num_classes == 2
    x = normal(30, 2)
    label_B = torch.arange(30) % 3
    v = labelled(x, at(0.6, x), label_B)
    everything = MixtureTeacher(weights / 7, means, stds)
    pair = MixtureTeacher(weights[[0, 2]], means[[0, 2]], stds[[0, 2]])
    alone = GaussianTeacher(means[1], stds[1])
    for label, teacher in ((0, alone), (1, pair), (2, everything)):
        rows = label_B == label
        torch.testing.assert_close(v[rows], teacher(x[rows], at(0.6, x[rows])), **EXACT)
    torch.testing.assert_close(labelled(x, at(0.6, x)), everything(x, at(0.6, x)), **EXACT)
    assert not torch.allclose(pair(x, at(0.6, x)), everything(x, at(0.6, x)), atol=1e-2)


def test_a_labelled_map_is_that_of_the_selected_components() -> None:
    """A class of one component is affine; the map of a batch may mix classes and the null label."""
    teacher = MixtureTeacher.from_spec(MIXTURE_1D)
    e = normal(40, 1)
    label_B = torch.arange(40) % 4
    X = teacher.flow_map(e, at(1.0, e), at(0.0, e), label_B)
    _, means, stds = MIXTURE_1D.tensors()
    for k in range(3):
        torch.testing.assert_close(X[label_B == k], means[k] + stds[k] * e[label_B == k], **EXACT)
    torch.testing.assert_close(X[label_B == 3], teacher.flow_map(e, at(1.0, e), at(0.0, e))[label_B == 3], **EXACT)


def test_samples_are_the_toy_and_follow_their_label() -> None:
    teacher = MixtureTeacher.from_spec(EIGHT_GAUSSIANS)
    index = torch.arange(4000)
    assert torch.equal(teacher.sample(Key(4), index), eight_gaussians(4000, 4).x)
    order = torch.tensor([17, 3, 3999])
    assert torch.equal(teacher.sample(Key(4), order), teacher.sample(Key(4), index)[order])
    label = index % 8
    means = torch.tensor(EIGHT_GAUSSIANS.means)
    assert (teacher.sample(Key(4), index, label) - means[label]).abs().max() < 6 * 0.08
    # The null label draws from all of the components.
    assert torch.equal(teacher.sample(Key(4), index, index * 0 + 8), teacher.sample(Key(4), index))


def test_the_exact_map_composes_and_refuses() -> None:
    teacher, e = WITH_A_MAP["mixture"]
    exact = ExactMap(teacher)
    assert isinstance(exact, FlowMap)
    assert isinstance(teacher, VelocityField)
    assert (exact.nfe, teacher.nfe) == (1, 1)
    x = e
    for n in range(4, 0, -1):
        x = exact(x, at(n / 4, e), at((n - 1) / 4, e))
    torch.testing.assert_close(x, exact(e, at(1.0, e), at(0.0, e)), **EXACT)
    torch.testing.assert_close(x, e - exact.average_velocity(e, at(1.0, e), at(0.0, e)), **EXACT)
    with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
        exact(e, at(0.5, e), at(0.6, e))


def test_refusals() -> None:
    x, t_B = normal(4, 2), torch.rand(4)
    eight = MixtureTeacher.from_spec(EIGHT_GAUSSIANS)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("1 dimension only", lambda: eight.flow_map(x, t_B, t_B)),
        ("label 9", lambda: eight(x, t_B, torch.tensor([0, 9, 1, 8]))),
        ("label -1", lambda: eight(x, t_B, torch.tensor([0, -1, 1, 8]))),
        ("2 dimensions, x has 3", lambda: eight(normal(4, 3), t_B)),
        ("2 dimensions, x has 1", lambda: eight(normal(4, 1), t_B)),
        ("4 dimensions, x has 2", lambda: FULL(x, t_B)),
        ("3 dimensions, x has 1", lambda: GaussianTeacher(0.0, torch.ones(3))(normal(4, 1), t_B)),
        ("positive std", lambda: GaussianTeacher(0.0, 0.0)),
        ("positive definite", lambda: GaussianTeacher.from_covariance(0.0, torch.ones(2, 2))),
        ("symmetric", lambda: GaussianTeacher.from_covariance(0.0, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))),
        ("positive", lambda: MixtureTeacher(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2))),
        ("positive", lambda: MixtureTeacher(torch.ones(2), torch.zeros(2, 1), torch.tensor([1.0, 0.0]))),
        (r"means \[K, D\]", lambda: MixtureTeacher(torch.ones(2), torch.zeros(2), torch.ones(2))),
        ("component_label", lambda: MixtureTeacher(torch.ones(2), torch.zeros(2, 1), torch.ones(2), torch.arange(3))),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("teacher", [GaussianTeacher(0.4, 0.6), MixtureTeacher.from_spec(MIXTURE_1D)])
def test_no_states_have_no_velocities(teacher: GaussianTeacher | MixtureTeacher) -> None:
    """As where none of the rows of a microbatch asks for one."""
    none, t = torch.empty(0, 1), torch.empty(0)
    assert teacher(none, t, torch.empty(0, dtype=torch.int64)).shape == (0, 1)
    assert teacher.average_velocity(none, t, t).shape == (0, 1)
