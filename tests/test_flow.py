"""The time convention: interpolants against their definition, domains against their promises, grids bit for bit."""

import math

import pytest
import torch

from fewstep.flow import LINEAR, Interpolant, TimeDomain, check_jumps, expand, uniform_grid

COSINE = Interpolant(
    alpha=lambda t: torch.cos(math.pi / 2 * t),
    sigma=lambda t: torch.sin(math.pi / 2 * t),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    d_sigma=lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
)
PATHS = pytest.mark.parametrize("path", [LINEAR, COSINE], ids=["linear", "cosine"])
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
    x, e, t_B = batch()
    torch.testing.assert_close(path.sample(x, e, 0 * t_B).x_t, x, **EXACT)
    torch.testing.assert_close(path.sample(x, e, 0 * t_B + 1).x_t, e, **EXACT)


@PATHS
def test_velocity_is_the_time_derivative(path: Interpolant) -> None:
    """Central differences, h = 1e-5: truncation h^2/6 * (pi/2)^3 = 6e-11, rounding 1e-16/h = 1e-11."""
    x, e, t_B = batch()
    h = 1e-5
    difference = (path.sample(x, e, t_B + h).x_t - path.sample(x, e, t_B - h).x_t) / (2 * h)
    torch.testing.assert_close(path.sample(x, e, t_B).v, difference, rtol=0, atol=1e-9)


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
