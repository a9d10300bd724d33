"""Distributions of times: exact inverse distribution functions, their keys, and the share of jumping rows."""

import math

import pytest
import torch

from fewstep.keys import Key
from fewstep.times import jump_rows, logit_normal, sample_times, uniform

N = 100_000
ROUNDING = 1e-12


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (-0.6, 1.6)])
def test_logit_normal_is_its_inverse_distribution_function(mean: float, std: float) -> None:
    """``P(T <= t) = Phi((logit t - mean) / std)`` takes the times back to the uniforms."""
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    t = logit_normal(mean, std)(u)
    torch.testing.assert_close(torch.special.ndtr((torch.logit(t) - mean) / std), u, rtol=0, atol=ROUNDING)
    assert (t[1:] > t[:-1]).all()
    # The median, and the quantile one standard deviation up.
    for quantile, logit in ((0.5, mean), (0.8413447460685429, mean + std)):
        t = logit_normal(mean, std)(torch.tensor([quantile], dtype=torch.float64))
        assert t.item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=ROUNDING)


def test_logit_normal_moments() -> None:
    """Of the logits of drawn times, within four standard errors."""
    t = sample_times(logit_normal(-0.4, 1.3), Key(0), "time", torch.arange(N))
    logit = torch.logit(t.double())
    assert float(logit.mean()) == pytest.approx(-0.4, abs=4 * 1.3 / math.sqrt(N))
    assert float(logit.std()) == pytest.approx(1.3, abs=4 * 1.3 / math.sqrt(2 * N))


def test_uniform() -> None:
    t = sample_times(uniform, Key(0), "time", torch.arange(N)).double()
    assert float(t.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * N))
    # The variance of (T - 1/2)^2 is 1/80 - 1/144 = 1/180.
    assert float((t - 0.5).square().mean()) == pytest.approx(1 / 12, abs=4 / math.sqrt(180 * N))


def test_times_are_keyed() -> None:
    """By seed, step, purpose and index; float32, one per sample."""
    index = torch.arange(50)
    t = sample_times(uniform, Key(1, 2), "time", index)
    assert t.dtype == torch.float32
    assert torch.equal(t, Key(1, 2).uniform("time", index).float())
    assert torch.equal(sample_times(uniform, Key(1, 2), "time", index[10:20]), t[10:20])
    for other in ((Key(2, 2), "time"), (Key(1, 3), "time"), (Key(1, 2), "second_time")):
        assert not torch.equal(sample_times(uniform, *other, index), t)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.75, 0.9, 1.0])
def test_share_of_jumps_is_exact(fraction: float) -> None:
    """Every prefix of n rows holds floor(n fraction) jumps: the wanted share, spread evenly.

    100 * 0.29 is just below 29 in floats, and counts as 29.
    """
    jump = jump_rows(torch.arange(4096), fraction)
    assert jump.dtype == torch.bool
    n = torch.arange(1, 4097)
    wanted = torch.tensor([math.floor(round(k * fraction, 9)) for k in n.tolist()])
    assert torch.equal(jump.cumsum(0), wanted)


@pytest.mark.parametrize(
    ("batch", "fraction", "jumps"), [(128, 0.25, 32), (128, 0.5, 64), (96, 1 / 3, 32), (10, 0.1, 1)]
)
def test_share_of_a_batch(batch: int, fraction: float, jumps: int) -> None:
    assert int(jump_rows(torch.arange(batch), fraction).sum()) == jumps


@pytest.mark.parametrize("world", [2, 4, 8])
def test_jumps_do_not_depend_on_the_number_of_processes(world: int) -> None:
    """Each rank's share of the rows, put together, is the single process's choice; and every rank has its part."""
    index = torch.arange(64)
    shares = [jump_rows(share, 0.25) for share in index.chunk(world)]
    assert torch.equal(torch.cat(shares), jump_rows(index, 0.25))
    assert {int(share.sum()) for share in shares} == {16 // world}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(jump_rows(index[order], 0.25), jump_rows(index, 0.25)[order])
