"""The Vendi score and the sliced distance where their values can be said in advance."""

import math

import pytest
import torch

from fewstep.evaluation.sliced import sliced_wasserstein2
from fewstep.evaluation.vendi import vendi_score


def normal(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("repeats", [1, 5])
def test_vendi_counts_orthogonal_samples(repeats):
    """Six directions, each ``repeats`` times and at other lengths: six different things. By K and by its dual form."""
    rows = torch.eye(6, 8).repeat(repeats, 1) * torch.arange(1, 6 * repeats + 1)[:, None]
    assert vendi_score(rows) == pytest.approx(6, rel=1e-12)


def test_vendi_of_copies_is_one():
    assert vendi_score(normal(1, 5, 0).expand(20, 5)) == pytest.approx(1, rel=1e-12)


def test_vendi_by_hand():
    """Cosine c between two samples: eigenvalues (1 +- c) / 2."""
    c = 0.6
    high, low = (1 + c) / 2, (1 - c) / 2
    expected = math.exp(-high * math.log(high) - low * math.log(low))
    assert vendi_score(torch.tensor([[2.0, 0.0], [0.6, 0.8]])) == pytest.approx(expected, rel=1e-6)


def test_vendi_of_both_forms_agree():
    """Features padded with zeros have more dimensions than samples, and the same similarities."""
    x = normal(40, 7, 1)
    assert vendi_score(torch.cat((x, torch.zeros(40, 60)), dim=1)) == pytest.approx(vendi_score(x), rel=1e-10)
    with pytest.raises(ValueError, match="length 0"):
        vendi_score(torch.zeros(4, 2))


def test_sliced_distance_of_a_shift():
    """A shift by s moves every projection by s.theta, whose mean square is |s|^2 / D: 3 |s|^2, here 3 * 25."""
    x = normal(50, 4, 2)
    shift = torch.tensor([3.0, 0.0, 0.0, -4.0])
    assert sliced_wasserstein2(x, x + shift, directions=20_000) == pytest.approx(75, rel=0.03)
    assert sliced_wasserstein2(x, x.flip(0)) == pytest.approx(0, abs=1e-20)


def test_sliced_distance_in_one_dimension():
    """One direction up to its sign: 3 times the mean squared gap of the sorted values, (1 + 1 + 4) / 3."""
    ref, gen = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[7.0], [2.0], [-1.0]])
    assert sliced_wasserstein2(ref, gen, directions=70) == pytest.approx(3 * (1 + 1 + 4) / 3, rel=1e-12)


def test_sliced_directions_come_from_the_seed():
    x, y = normal(60, 6, 3), normal(60, 6, 4)
    assert sliced_wasserstein2(x, y, 100) == sliced_wasserstein2(x, y, 100)
    assert sliced_wasserstein2(x, y, 100, seed=1) != sliced_wasserstein2(x, y, 100)
    with pytest.raises(ValueError, match="60 and 59"):
        sliced_wasserstein2(x, y[1:])
