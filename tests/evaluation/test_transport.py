"""Straightness and the 2-Wasserstein distance against closed forms."""

import pytest
import torch
from scipy.integrate import quad

from fewstep.data.dataset import Dataset
from fewstep.evaluation.trajectory import straightness_of
from fewstep.evaluation.transport import straightness, straightness_samples, wasserstein2
from fewstep.keys import Key
from fewstep.sampling import MapSampler, OdeSampler
from fewstep.teachers.analytic import ExactMap, GaussianTeacher


def noise(count: int, dim: int) -> torch.Tensor:
    """Normal draws in float64 whose second moment is exactly one."""
    z = Key(0).normal("transport", torch.arange(count), (dim,)).double()
    return z / z.square().mean().sqrt()


@pytest.mark.parametrize("std", [0.1, 0.3, 0.8])
def test_straightness_of_a_gaussian(std: float) -> None:
    """Along ``mu_t + sd_t z`` the velocity is ``-m + sd_t' z`` and the chord ``-m + (1 - s) z``, so
    ``S = int (sd_t' - (1 - s))^2 dt``. Quadrature error at 256 steps: 4e-6 measured at s = 0.3, 7e-5 at 0.1."""

    def slope(t: float) -> float:
        return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) ** 0.5

    wanted = quad(lambda t: (slope(t) - (1 - std)) ** 2, 0, 1)[0]
    found = straightness(GaussianTeacher(0.7, std), noise(500, 2), steps=256)
    assert found == pytest.approx(wanted, abs=2e-4)


def test_a_straight_flow_has_straightness_zero() -> None:
    """A source that is the data's own law, shifted: every path is the shift."""
    assert straightness(GaussianTeacher(3.0, 1e6), 1e6 * noise(50, 2), steps=8) != 0  # not straight: the control

    class Shift:
        nfe = 1

        def __call__(self, x: torch.Tensor, t_B: torch.Tensor, label_B: torch.Tensor | None = None) -> torch.Tensor:
            return torch.full_like(x, 2.5)

    assert straightness(Shift(), noise(50, 2), steps=8) < 1e-14


def test_only_velocity_fields_are_asked_how_straight_they_are() -> None:
    data = Dataset("cloud", torch.zeros(10, 2), None, 0, kind="points")
    teacher, cpu = GaussianTeacher(0.0, 0.5), torch.device("cpu")
    assert straightness_of(MapSampler({0: ExactMap(teacher)}, "jumps"), data, 0, cpu) is None
    found = straightness_of(OdeSampler(teacher), data, 0, cpu)
    assert found == pytest.approx(straightness(teacher, Key(0).normal("noise", torch.arange(1024), (2,))), rel=1e-6)


def test_fewer_samples_where_each_has_more_coordinates() -> None:
    assert [straightness_samples(dim) for dim in (1, 2, 64, 3072)] == [1024, 1024, 128, 32]


def test_w2_of_shifted_clouds_is_the_shift() -> None:
    """A translation is the optimal map, whatever the cloud."""
    cloud = noise(300, 3)
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
    assert wasserstein2(cloud, cloud.flip(0) + shift) == pytest.approx(1.3, abs=1e-12)
    assert wasserstein2(cloud, cloud) == 0


def test_w2_on_a_line_is_that_of_sorted_points() -> None:
    a, b = noise(400, 1), 0.3 * noise(500, 1)[100:] + 1
    sorted_ = (a.sort(dim=0).values - b.sort(dim=0).values).square().mean().sqrt()
    assert wasserstein2(a, b) == pytest.approx(float(sorted_), rel=1e-12)


def test_w2_takes_as_many_points_as_both_clouds_have() -> None:
    a, b = noise(100, 2), noise(60, 2)
    assert wasserstein2(a, b) == wasserstein2(a[:60], b)
    assert wasserstein2(a, b, points=20) == wasserstein2(a[:20], b[:20])
