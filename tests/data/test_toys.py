"""Toys: where their points may lie, in what proportions, and that a point depends on (seed, index) alone.

The seeds are fixed, so nothing here is random; tolerances are four standard errors unless said otherwise.
"""

import math

import pytest
import torch

from fewstep.data.toys import EIGHT_GAUSSIANS, MIXTURE, MIXTURE_1D, TOYS, MixtureSpec, Toy, draw_mixture
from fewstep.keys import Key

N = 40_000


def same(a: Toy, b: Toy) -> bool:
    labels = a.label is b.label is None or torch.equal(a.label, b.label)
    return labels and torch.equal(a.x, b.x)


@pytest.mark.parametrize("name", TOYS)
def test_points_are_addressed(name: str) -> None:
    toy, longer, other = TOYS[name](50, 7), TOYS[name](80, 7), TOYS[name](50, 8)
    assert toy.x.dtype == torch.float32
    assert same(toy, Toy(longer.x[:50], None if longer.label is None else longer.label[:50]))
    assert not torch.isclose(toy.x, other.x).any(), "another seed moves every coordinate"
    assert toy.x.unique(dim=0).shape[0] == 50


def test_checkerboard_covers_the_dark_squares_evenly() -> None:
    toy = TOYS["checkerboard"](N, 0)
    assert toy.label is None
    position = (toy.x.double() + 1) * 2
    column, row = position.floor().long().unbind(1)
    assert position.min() >= 0
    assert position.max() < 4
    assert ((column + row) % 2 == 0).all(), "the square at the lower left is dark"
    counts = torch.bincount(4 * column + row, minlength=16)
    assert (counts > 0).sum() == 8
    # Inside its square a point is uniform: mean 1/2, variance 1/12 (of which the standard error is sqrt(1/180 N)).
    assert (counts[counts > 0] - N / 8).abs().max() < 4 * math.sqrt(N * 7 / 64)
    inside = position - position.floor()
    assert (inside.mean(0) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / N)
    assert (inside.var(0) - 1 / 12).abs().max() < 4 * math.sqrt(1 / 180 / N)
    assert abs(torch.corrcoef(inside.T)[0, 1].item()) < 4 / math.sqrt(N)


def test_two_moons_are_two_half_circles() -> None:
    toy = TOYS["two_moons"](N, 0)
    assert toy.label is not None
    assert abs(toy.label.double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(N)
    for label, side in ((0, 1), (1, -1)):
        # The upper moon has its centre left of and below the origin and keeps its upper half; the lower mirrors it.
        spoke = toy.x[toy.label == label].double() + side * torch.tensor([1 / 3, 1 / 6])
        distance = spoke.norm(dim=1)
        # Noise of std 0.05 pushes the mean distance out by 0.05^2 / (2 * 2/3).
        count = len(distance)
        assert abs(distance.mean().item() - 2 / 3 - 0.05**2 / (4 / 3)) < 4 * 0.05 / math.sqrt(count)
        assert abs(distance.std().item() - 0.05) < 4 * 0.05 / math.sqrt(2 * count) + 1e-3
        assert (side * spoke[:, 1]).min() > -5 * 0.05
        # A uniform angle on a half circle: E[cos] = 0, E[sin] = 2 / pi.
        assert abs(spoke[:, 0].mean().item()) < 4 * 0.5 / math.sqrt(count)
        assert abs((side * spoke[:, 1]).mean().item() - 2 / 3 * 2 / math.pi) < 4 * 0.3 / math.sqrt(count)
    assert toy.x.abs().max() < 1.3


@pytest.mark.parametrize(
    ("name", "spec"), [("eight_gaussians", EIGHT_GAUSSIANS), ("mixture", MIXTURE), ("mixture_1d", MIXTURE_1D)]
)
def test_mixtures_have_their_weights_means_and_stds(name: str, spec: MixtureSpec) -> None:
    toy = TOYS[name](N, 0)
    assert toy.label is not None
    for k, (weight, mean, std) in enumerate(zip(spec.weights, spec.means, spec.stds, strict=True)):
        x = toy.x[toy.label == spec.component_label[k]].double()
        assert abs(len(x) - weight * N) < 4 * math.sqrt(N * weight * (1 - weight))
        z = (x - torch.tensor(mean, dtype=torch.float64)) / std
        assert z.mean(0).abs().max() < 4 / math.sqrt(len(x))
        assert (z.var(0) - 1).abs().max() < 4 * math.sqrt(2 / len(x))
        if len(mean) == 2:
            assert abs(torch.corrcoef(z.T)[0, 1].item()) < 4 / math.sqrt(len(x))


def test_eight_gaussians_are_counted_anticlockwise() -> None:
    assert EIGHT_GAUSSIANS.means[0] == (0.8, 0.0)
    assert EIGHT_GAUSSIANS.means[2] == pytest.approx((0.0, 0.8))
    toy = TOYS["eight_gaussians"](1000, 0)
    angle = torch.atan2(toy.x[:, 1], toy.x[:, 0]) / (math.pi / 4)
    assert torch.equal(angle.round().long() % 8, toy.label)


def test_draw_mixture_takes_weights_per_row() -> None:
    """Weights of zero are never drawn, at either end or in the middle, and weights need no normalisation."""
    means, stds = torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([0.1, 0.1, 0.1])
    weights = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 1.0]]).repeat(1000, 1)
    x, component = draw_mixture(weights, means, stds, Key(0), torch.arange(3000))
    assert (component[0::3] == 1).all()
    assert (component[1::3] == 2).all()
    assert set(component[2::3].tolist()) == {0, 2}
    assert abs((component[2::3] == 0).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(1000)
    assert ((x[:, 0] / 10).round() == component).all()
