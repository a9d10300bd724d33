"""Sources: zero mean and unit variance, each its own law, and noise that belongs to its sample alone."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from fewstep.keys import Key
from fewstep.sources import SOURCES, Source, gaussian, sphere

N, SHAPE = 40_000, (1, 2, 3)
EVERY = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
KURTOSIS = {"gaussian": 3.0, "uniform": 9 / 5, "laplace": 6.0, "sphere": 3 * 6 / 8}
"""Fourth moments of a coordinate; ``3 D / (D + 2)`` on the sphere."""


def drawn(source: Source) -> Tensor:
    """``[N, 6]`` float64."""
    return source(Key(11, 2), "noise", torch.arange(N), SHAPE).flatten(1).double()


@pytest.mark.parametrize("name", SOURCES)
def test_mean_zero_and_variance_one(name: str) -> None:
    """Per coordinate within 4.5 standard errors: a chance of 1e-4 over the 12 numbers of a source. What that can see at
    40,000 draws: a mean 0.035 off, and a variance 8 % off even with the heaviest tails, which is the control."""
    e = drawn(SOURCES[name])
    assert (e.mean(dim=0).abs() < 4.5 / math.sqrt(N)).all()
    spread = math.sqrt((KURTOSIS[name] - 1) / N)
    assert ((e.square().mean(dim=0) - 1).abs() < 4.5 * spread).all()
    assert ((1.08 * e.square().mean(dim=0) - 1).abs() > 4.5 * spread).all()
    # No two coordinates go together.
    correlation = e.T @ e / N - torch.eye(6, dtype=torch.float64)
    assert float((correlation - correlation.diag().diag()).abs().max()) < 4.5 / math.sqrt(N)


def sphere_coordinate(e: np.ndarray) -> np.ndarray:
    """A coordinate squared over D is Beta(1/2, (D - 1)/2) on the sphere in D dimensions."""
    inside = scipy.special.betainc(0.5, 2.5, np.minimum(e**2 / 6, 1))
    return 0.5 + np.sign(e) * inside / 2


LAWS = {
    "gaussian": scipy.stats.norm.cdf,
    "uniform": scipy.stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)).cdf,
    "laplace": scipy.stats.laplace(scale=1 / math.sqrt(2)).cdf,
    "sphere": sphere_coordinate,
}


@pytest.mark.parametrize("name", SOURCES)
def test_law_of_a_coordinate(name: str) -> None:
    """Kolmogorov-Smirnov of the first coordinate below its 0.1 % point, and of a copy stretched by 3 % beyond it for
    the uniform one, 8 % for the others, whose density is less sharp."""
    e = drawn(SOURCES[name])[:, 0].numpy()
    bound = 1.95 / math.sqrt(N)
    assert scipy.stats.kstest(e, LAWS[name]).statistic < bound
    assert scipy.stats.kstest((1.03 if name == "uniform" else 1.08) * e, LAWS[name]).statistic > bound
    for other in set(SOURCES) - {name}:
        assert scipy.stats.kstest(e, LAWS[other]).statistic > bound, other


def test_length_on_the_sphere() -> None:
    """``sqrt(D)`` to float32, in the direction of the Gaussian draw of the same key; in one dimension it is a sign."""
    e, normal = drawn(sphere), drawn(gaussian)
    torch.testing.assert_close(e.norm(dim=1), torch.full((N,), math.sqrt(6), dtype=torch.float64), rtol=1e-6, atol=0)
    direction = torch.nn.functional.cosine_similarity(e, normal)
    torch.testing.assert_close(direction, torch.ones_like(direction), rtol=0, atol=1e-6)
    signs = sphere(Key(0), "noise", torch.arange(1000), (1,))
    torch.testing.assert_close(signs.abs(), torch.ones(1000, 1), rtol=1e-6, atol=0)
    assert 400 < int((signs > 0).sum()) < 600


@EVERY
def test_noise_belongs_to_its_sample(source: Source) -> None:
    """To the bit: index i in any batch, in any order, among any others; and by seed, step and purpose."""
    key, index = Key(4, 9), torch.arange(64)
    e = source(key, "noise", index, SHAPE)
    assert e.shape == (64, *SHAPE)
    assert e.dtype == torch.float32
    assert torch.equal(source(key, "noise", index[17:23], SHAPE), e[17:23])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(source(key, "noise", order, SHAPE), e[order])
    assert torch.equal(source(key, "noise", torch.tensor([63]), SHAPE), e[63:])
    assert torch.unique(e.flatten(1), dim=0).shape == (64, 6)
    for other, purpose in ((Key(5, 9), "noise"), (Key(4, 8), "noise"), (key, "renoise")):
        assert not torch.equal(source(other, purpose, index, SHAPE), e)


@EVERY
def test_every_draw_is_finite(source: Source) -> None:
    """Also of the largest and smallest words of the generator, (k + 1/2) / 2^32: the Laplace tail ends at 15.2."""

    class Ends(Key):
        def uniform(self, purpose: str, index_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
            ends = torch.tensor([0.5, 2**32 - 0.5, 2**31], dtype=torch.float64) / 2**32
            return ends.reshape(3, *[1] * len(shape)).expand(3, *shape)

    e = source(Ends(0), "noise", torch.arange(3), SHAPE)
    assert e.isfinite().all()
    if source is SOURCES["laplace"]:
        wanted = math.log(2**32) / math.sqrt(2)
        torch.testing.assert_close(e[:, 0, 0, 0], torch.tensor([-wanted, wanted, 0.0]), rtol=1e-6, atol=1e-7)
