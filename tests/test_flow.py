"""The time convention: interpolants against their definition, domains against their promises, grids bit for bit."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep import flow
from fewstep.flow import COSINE, LINEAR, Interpolant, TimeDomain, check_jumps, expand, uniform_grid, variance_preserving
from fewstep.teachers.analytic import GaussianTeacher

VP = flow.PATHS["variance_preserving"]
PATHS = pytest.mark.parametrize("path", flow.PATHS.values(), ids=flow.PATHS)
EXACT = {"rtol": 0.0, "atol": 1e-12}  # float64, a handful of roundings of numbers of order one


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data and noise [7, 3, 2, 2] in float64, with a different time for each row, clear of both ends."""
    generator = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, 7, 3, 2, 2, generator=generator, dtype=torch.float64)
    return x, e, torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


def test_linear_path_by_hand() -> None:
    """x = 2, e = -1, t = 1/4: x_t = 3/4 * 2 - 1/4 = 5/4 and v = -1 - 2 = -3."""
    point = LINEAR.sample(torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([0.25]))
    assert point.x_t.item() == 1.25
    assert point.v.item() == -3.0


def test_linear_conversions_are_the_documented_ones() -> None:
    x, e, t_B = batch()
    x_t, v, t = x, e, t_B.reshape(7, 1, 1, 1)  # any pair of numbers will do
    torch.testing.assert_close(LINEAR.data_from_velocity(x_t, v, t_B), x_t - t * v, **EXACT)
    torch.testing.assert_close(LINEAR.noise_from_velocity(x_t, v, t_B), x_t + (1 - t) * v, **EXACT)


@PATHS
def test_path_runs_from_data_to_noise(path: Interpolant) -> None:
    """At ``t = 1`` to the noise alone, at 0 to the data alone. But the variance-preserving path begins at the time 1e-5
    of its diffusion: by then ``sigma^2`` has grown by ``beta_min 1e-5 / (1 - end)``, to first order; the next one is
    ``(beta_max - beta_min) / 2 1e-10``, 1e-9."""
    x, e, t_B = batch()
    torch.testing.assert_close(path.sample(x, e, 0 * t_B + 1).x_t, e, **EXACT)
    if path is not VP:
        torch.testing.assert_close(path.sample(x, e, 0 * t_B).x_t, x, **EXACT)
        return
    start = torch.zeros((), dtype=torch.float64)
    first = math.sqrt(0.1 * 1e-5 / (1 - math.exp(-5.025)))
    assert float(path.sigma(start)) ** 2 == pytest.approx(first**2, abs=2e-9)
    assert float(path.linear_time(start)) == pytest.approx(first, abs=3e-6)  # s = sigma / (1 + sigma), 1e-6 lower
    wanted = math.sqrt(1 - float(path.sigma(start)) ** 2) * x + path.sigma(start) * e
    torch.testing.assert_close(path.sample(x, e, 0 * t_B).x_t, wanted, **EXACT)


@PATHS
def test_velocity_is_the_time_derivative(path: Interpolant) -> None:
    """Differentiated in forward mode: a difference quotient would say more of itself where ``sigma`` is a root."""
    x, e, t_B = batch()
    _, derivative = torch.func.jvp(lambda t: path.sample(x, e, t).x_t, (t_B,), (torch.ones_like(t_B),))
    torch.testing.assert_close(path.sample(x, e, t_B).v, derivative, **EXACT)
    h = 1e-4  # and a quotient: its error is h^2 / 6 times the third derivative, below 30 here, times x and e
    difference = (path.sample(x, e, t_B + h).x_t - path.sample(x, e, t_B - h).x_t) / (2 * h)
    torch.testing.assert_close(derivative, difference, rtol=0, atol=2e-7)


@PATHS
def test_velocity_gives_back_data_and_noise(path: Interpolant) -> None:
    x, e, t_B = batch()
    for times in (t_B, 0 * t_B, 0 * t_B + 1):  # neither conversion is singular at an end
        point = path.sample(x, e, times)
        torch.testing.assert_close(path.data_from_velocity(point.x_t, point.v, times), x, **EXACT)
        torch.testing.assert_close(path.noise_from_velocity(point.x_t, point.v, times), e, **EXACT)


@PATHS
def test_data_and_noise_give_back_the_velocity(path: Interpolant) -> None:
    x, e, t_B = batch()
    point = path.sample(x, e, t_B)
    torch.testing.assert_close(path.velocity_from_data(point.x_t, x, t_B), point.v, **EXACT)
    torch.testing.assert_close(path.velocity_from_noise(point.x_t, e, t_B), point.v, **EXACT)


@PATHS
def test_each_row_has_its_own_time(path: Interpolant) -> None:
    """A batch equals its rows one by one: the time goes with the row, not with the last dimension."""
    x, e, t_B = batch()
    x, e, t_B = x[:2], e[:2], t_B[:2]  # as many rows as columns, where a wrong broadcast would pass silently
    whole = path.sample(x, e, t_B)
    hat = path.data_from_velocity(whole.x_t, e, t_B)
    for b in range(2):
        row = path.sample(x[b : b + 1], e[b : b + 1], t_B[b : b + 1])
        torch.testing.assert_close(whole.x_t[b], row.x_t[0], **EXACT)
        torch.testing.assert_close(hat[b], path.data_from_velocity(row.x_t, e[b : b + 1], t_B[b : b + 1])[0], **EXACT)


# ----------------------------------------------------------------------- every path as the linear one in other units

GRID_OF_TIMES = torch.linspace(0, 1, 1001, dtype=torch.float64)  # with both ends
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 4e-6)], ids=["float64", "float32"]
)
"""Some roundings of numbers of order one; velocities are compared relative to their size."""


def along(path: Interpolant, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Data and noise ``[1001, 3]`` and the times of the grid, in one precision."""
    x, e = torch.randn(2, 1001, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x, e, GRID_OF_TIMES.to(dtype)


@PATHS
@PRECISIONS
def test_state_is_the_linear_one_scaled(path: Interpolant, dtype: torch.dtype, near: float) -> None:
    """``alpha x + sigma e = (alpha + sigma) [(1 - s) x + s e]``, and ``s`` runs in order within [0, 1] to rounding."""
    x, e, t_B = along(path, dtype)
    s_B = path.linear_time(t_B)
    linear = LINEAR.sample(x, e, s_B).x_t
    torch.testing.assert_close(expand(path.scale(t_B), x) * linear, path.sample(x, e, t_B).x_t, rtol=0, atol=near)
    assert (s_B[1:] > s_B[:-1]).all()
    assert float(s_B[0]) >= 0
    assert float(s_B[-1]) == pytest.approx(1, abs=near)


@PATHS
@PRECISIONS
def test_velocity_to_the_linear_one_and_back(path: Interpolant, dtype: torch.dtype, near: float) -> None:
    """Of a pair both ways, ``alpha' x + sigma' e <-> e - x``; and of any state and velocity there and back, whether
    they belong together or not."""
    x, e, t_B = along(path, dtype)
    here = path.sample(x, e, t_B)
    x_s = LINEAR.sample(x, e, path.linear_time(t_B)).x_t
    torch.testing.assert_close(path.velocity_from_linear(x_s, e - x, t_B), here.v, rtol=near, atol=near)
    torch.testing.assert_close(path.linear_from_velocity(here.x_t, here.v, t_B), e - x, rtol=near, atol=near)
    v, state = e.square(), x.exp()
    there = path.velocity_from_linear(state, v, t_B)
    back = path.linear_from_velocity(expand(path.scale(t_B), x) * state, there, t_B)
    # An error of the velocity weighs ``1 / velocity_scale``, at most 15, on the way back.
    torch.testing.assert_close(back, v, rtol=15 * near, atol=15 * near * float(state.max()))


@PATHS
@PRECISIONS
def test_times_to_the_linear_ones_and_back(path: Interpolant, dtype: torch.dtype, near: float) -> None:
    """``t -> s -> t`` everywhere. ``s -> t -> s`` wherever the path has that ``s``: what is below its first one goes
    to ``t = 0``."""
    t_B = GRID_OF_TIMES.to(dtype)
    torch.testing.assert_close(path.time_at(path.linear_time(t_B)), t_B, rtol=0, atol=near)
    start = path.linear_time(torch.zeros(1, dtype=dtype))
    again = path.linear_time(path.time_at(t_B))
    torch.testing.assert_close(again, t_B.clamp_min(float(start)), rtol=0, atol=near)
    below = torch.linspace(0, 0.999, 10, dtype=dtype) * start
    assert torch.equal(path.time_at(below), torch.zeros(10, dtype=dtype))
    assert path.time_at(torch.ones(1, dtype=dtype)).item() == pytest.approx(1, abs=near)


@PATHS
def test_velocity_scale_is_what_an_error_grows_by(path: Interpolant) -> None:
    """The velocities of two linear velocities ``v`` and ``v + d`` differ by ``velocity_scale d``, for any ``d``."""
    x, e, t_B = along(path, torch.float64)
    d = torch.cos(7 * x)
    difference = path.velocity_from_linear(x, e + d, t_B) - path.velocity_from_linear(x, e, t_B)
    wanted = expand(path.velocity_scale(t_B), x) * d
    torch.testing.assert_close(difference, wanted, rtol=0, atol=1e-11)  # of velocities up to 50 at t = 0
    if path is LINEAR:
        assert torch.equal(path.velocity_scale(t_B), torch.ones_like(t_B))
    if path is COSINE:  # (pi / 2) / (cos + sin)
        wanted = math.pi / 2 / (math.sqrt(2) * torch.cos(math.pi / 2 * (t_B - 0.5)))
        torch.testing.assert_close(path.velocity_scale(t_B), wanted, **EXACT)


@pytest.mark.parametrize("path", [COSINE, VP], ids=["cosine", "variance_preserving"])
def test_variance_is_preserved(path: Interpolant) -> None:
    """``alpha^2 + sigma^2 = 1`` to rounding, in both precisions: no cancellation near data."""
    for dtype in (torch.float64, torch.float32):
        t_B = GRID_OF_TIMES.to(dtype)
        both = path.alpha(t_B).square() + path.sigma(t_B).square()
        torch.testing.assert_close(both, torch.ones_like(t_B), rtol=0, atol=4 * torch.finfo(dtype).eps)


@PATHS
def test_nothing_of_the_data_is_left_at_the_end(path: Interpolant) -> None:
    """``alpha(1) = 0``: sampling starts from noise alone."""
    assert float(path.alpha(torch.ones((), dtype=torch.float64))) == pytest.approx(0, abs=1e-16)
    assert float(path.alpha(torch.ones(()))) == pytest.approx(0, abs=1e-7)


def diffusion_alpha(t: Tensor, beta_min: float, beta_max: float, first: float) -> Tensor:
    """The definition: ``exp(-1/2 int beta)`` with ``beta`` linear in time, whose integral the trapezoid rule has
    exactly; then what is left of it at the end is taken away and the rest scaled to begin at one."""

    def diffusion(clock: Tensor) -> Tensor:
        return torch.exp(-clock * (beta_min + (beta_min + (beta_max - beta_min) * clock)) / 4)

    end = diffusion(torch.ones((), dtype=torch.float64))
    return (diffusion(first + (1 - first) * t) - end) / (1 - end)


@pytest.mark.parametrize(("beta_min", "beta_max", "first"), [(0.1, 20.0, 1e-5), (0.2, 12.0, 1e-3)])
def test_variance_preserving_noise_levels(beta_min: float, beta_max: float, first: float) -> None:
    """``log SNR = 2 log alpha - log(1 - alpha^2)`` from the definition, whose rounding is 1e-16 over the 1e-6 that
    ``1 - alpha^2`` is near data."""
    path, t = variance_preserving(beta_min, beta_max, first), GRID_OF_TIMES[:-1]
    alpha = diffusion_alpha(t, beta_min, beta_max, first)
    wanted = 2 * alpha.log() - (1 - alpha.square()).log()
    torch.testing.assert_close(2 * (path.alpha(t) / path.sigma(t)).log(), wanted, rtol=0, atol=1e-9)
    assert (wanted[1:] < wanted[:-1]).all()


def gaussian_path_velocity(
    z: Tensor, t: Tensor, m: float, s: float, alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]
) -> Tensor:
    """A component N(m, s^2) is N(alpha m, alpha^2 s^2 + sigma^2) at ``t``, and its velocity moves mean and deviation:
    ``alpha' m + (variance' / 2 variance) (z - alpha m)``, derivatives by forward mode."""
    one = torch.ones_like(t)
    a, d_a = torch.func.jvp(alpha, (t,), (one,))
    variance, d_variance = torch.func.jvp(lambda t: (alpha(t) * s) ** 2 + sigma(t) ** 2, (t,), (one,))
    return d_a[:, None] * m + (d_variance / (2 * variance))[:, None] * (z - a[:, None] * m)


DEFINITIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda t: 1 - t, lambda t: 1 * t),
    "cosine": (lambda t: torch.sin(math.pi / 2 * (1 - t)), lambda t: torch.cos(math.pi / 2 * (1 - t))),
    "variance_preserving": (
        lambda t: diffusion_alpha(t, 0.1, 20.0, 1e-5),
        lambda t: (1 - diffusion_alpha(t, 0.1, 20.0, 1e-5) ** 2).sqrt(),
    ),
}


@pytest.mark.parametrize("name", flow.PATHS)
def test_velocity_of_a_gaussian_on_every_path(name: str) -> None:
    """The path's own closed form equals the linear teacher's velocity carried over by ``velocity_from_linear``, and the
    other way, at states up to three deviations out: 1e-10, as ``1 - alpha^2`` loses four digits at t = .001."""
    path, (alpha, sigma) = flow.PATHS[name], DEFINITIONS[name]
    m, s = 0.8, 0.6
    t_B = torch.cat((torch.tensor([1e-3, 1e-2], dtype=torch.float64), GRID_OF_TIMES[20:]))
    deviations = torch.linspace(-3, 3, 5, dtype=torch.float64)
    spread = ((alpha(t_B) * s) ** 2 + sigma(t_B) ** 2).sqrt()[:, None]
    z = alpha(t_B)[:, None] * m + spread * deviations
    wanted = gaussian_path_velocity(z, t_B, m, s, alpha, sigma)
    x_s, s_B = z / path.scale(t_B)[:, None], path.linear_time(t_B)
    v = GaussianTeacher(m, s)(x_s, s_B)
    torch.testing.assert_close(path.velocity_from_linear(x_s, v, t_B), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.linear_from_velocity(z, wanted, t_B), v, rtol=1e-10, atol=1e-10)


def test_expand_puts_times_in_front() -> None:
    t_B = torch.tensor([0.25, 0.5])
    scaled = expand(t_B, torch.ones(2, 2, 2)) * torch.ones(2, 2, 2)
    assert scaled[0].unique().tolist() == [0.25]
    assert scaled[1].unique().tolist() == [0.5]
    assert expand(t_B, torch.ones(2)).tolist() == [0.25, 0.5]


GRID = TimeDomain("grid", (1.0, 2 / 3, 1 / 3, 0.0))


@pytest.mark.parametrize(
    ("domain", "t", "r"),
    [
        (TimeDomain("any"), 1.0, 0.0),
        (TimeDomain("any"), 0.7, 0.3),
        (TimeDomain("to_data"), 0.7, 0.0),
        (TimeDomain("to_data"), 0.7, 0.7),  # the identity belongs to every domain
        (GRID, 1.0, 2 / 3),
        (GRID, torch.tensor(2 / 3).item(), torch.tensor(1 / 3).item()),  # nodes rounded to float32
        (GRID, 1 / 3, 0.0),
        (GRID, 0.5, 0.5),
    ],
)
def test_domain_accepts(domain: TimeDomain, t: float, r: float) -> None:
    domain.check(t, r)


@pytest.mark.parametrize(
    ("domain", "t", "r", "message"),
    [
        (TimeDomain("any"), 0.3, 0.7, "0 <= r <= t <= 1"),
        (TimeDomain("any"), 1.1, 0.0, "0 <= r <= t <= 1"),
        (TimeDomain("any"), 0.5, -0.1, "0 <= r <= t <= 1"),
        (TimeDomain("any"), math.nan, 0.0, "0 <= r <= t <= 1"),
        (TimeDomain("to_data"), 1.0, 0.5, "r = 0"),
        (GRID, 1.0, 1 / 3, "consecutive"),  # skips a node
        (GRID, 1.0, 0.0, "consecutive"),
        (GRID, 0.9, 2 / 3, "consecutive"),  # starts off the grid
        (GRID, 1.0, 0.6, "consecutive"),  # ends off the grid
        (GRID, 1 / 3, 2 / 3, "0 <= r <= t <= 1"),
    ],
)
def test_domain_refuses(domain: TimeDomain, t: float, r: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain.check(t, r)


def test_one_bad_row_refuses_the_batch() -> None:
    t_B = torch.tensor([1.0, 1.0, 2 / 3])
    check_jumps(GRID, t_B, torch.tensor([2 / 3, 2 / 3, 1 / 3]))
    with pytest.raises(ValueError, match=r"t = 0\.666667, r = 0\b"):
        check_jumps(GRID, t_B, torch.tensor([2 / 3, 2 / 3, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_grids_nest_exactly(dtype: torch.dtype) -> None:
    for steps in range(1, 130):
        coarse, fine = uniform_grid(steps, dtype=dtype), uniform_grid(2 * steps, dtype=dtype)
        assert coarse.dtype == dtype
        assert torch.equal(fine[::2], coarse)
        assert (coarse[0], coarse[-1]) == (1, 0)
        wanted = torch.tensor([1 - n / steps for n in range(steps + 1)], dtype=torch.float64)
        torch.testing.assert_close(coarse.double(), wanted, rtol=0, atol=torch.finfo(dtype).eps)


def test_grid_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        uniform_grid(0)
