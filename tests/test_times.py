"""Distributions of times: exact inverse distribution functions, their keys, and the share of jumping rows."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from fewstep.keys import Key
from fewstep.times import (
    Times,
    jump_rows,
    logit_normal,
    sample_times,
    shifted,
    sorted_pairs,
    truncated_log_normal,
    u_shaped,
    uniform,
)

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


# Both ends of what the keys give, (k + 1/2) / 2^32, and what lies between.
U = torch.cat(
    (
        torch.tensor([0.5, 1.5, 100.5, 1e5 + 0.5], dtype=torch.float64) / 2**32,
        torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1],
        1 - torch.tensor([1e5 + 0.5, 100.5, 1.5, 0.5], dtype=torch.float64) / 2**32,
    )
)
SPANS = [(-2.0, 1.0), (-0.5, 9.0), (-4.2, 4.6), (6.0, 9.0), (-9.0, -6.0), (8.0, 8.5), (-12.0, -8.0), (9.0, 40.0)]


@pytest.mark.parametrize(("low", "high"), SPANS)
@pytest.mark.parametrize(("mean", "std"), [(-4.0, 1.0), (-1.2, 0.4)])
def test_truncated_log_normal_is_its_inverse_distribution_function(
    low: float, high: float, mean: float, std: float
) -> None:
    """``F(times(u)) = u`` to 1e-10 with scipy's truncated normal of ``ln sigma = logit t``, ``low`` to ``high``
    deviations from the mean, also where a span holds 1e-33 of the normal. (The means keep times so far from 1 that
    their logits have the digits for it.) No mass lies at the bounds: different uniforms are different times."""
    times = truncated_log_normal(mean, std, math.exp(mean + std * low), math.exp(mean + std * high))
    t = times(U)
    z = (torch.logit(t) - mean) / std
    np.testing.assert_allclose(scipy.stats.truncnorm.cdf(z.numpy(), low, high), U.numpy(), rtol=0, atol=1e-10)
    assert (t[1:] > t[:-1]).all()
    assert low < float(z[0])
    assert float(z[-1]) < high


def test_truncated_log_normal_without_reach_is_the_whole() -> None:
    """Bounds 30 deviations out cut nothing off: the logit-normal distribution, to 1e-12."""
    whole = truncated_log_normal(-1.2, 0.8, math.exp(-1.2 - 24), math.exp(-1.2 + 24))
    torch.testing.assert_close(whole(U), logit_normal(-1.2, 0.8)(U), rtol=1e-12, atol=0)


def test_bounds_in_order() -> None:
    for low, high in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="sigma_min to a larger sigma_max"):
            truncated_log_normal(0.0, 1.0, low, high)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0, 100.0])
def test_u_shaped_is_its_inverse_distribution_function(sharpness: float) -> None:
    """``F(t) = (e^{a t} - e^{a (1 - t)} + e^a - 1) / (2 (e^a - 1))`` integrates ``e^{a t} + e^{a (1 - t)}``; it takes
    the times back to the uniforms, and the density is mirrored at one half."""
    a, t = sharpness, u_shaped(sharpness)(U)
    # Divided by e^a, or 100 would overflow in single terms.
    up, down, all_of_it = torch.exp(a * (t - 1)), torch.exp(-a * t), 1 - math.exp(-a)
    torch.testing.assert_close((up - down + all_of_it) / (2 * all_of_it), U, rtol=0, atol=1e-10)
    torch.testing.assert_close(u_shaped(a)(1 - U), 1 - t, rtol=0, atol=1e-12)
    assert ((t > 0) & (t < 1)).all()
    assert (t[1:] > t[:-1]).all()
    # And by quadrature of the density itself.
    low, high = u_shaped(a)(torch.tensor([0.2, 0.9], dtype=torch.float64)).tolist()
    mass = [
        scipy.integrate.quad(lambda t: math.exp(a * (t - 1)) + math.exp(-a * t), *span, epsabs=1e-13)[0]
        for span in ((low, high), (0, 1))
    ]
    assert mass[0] / mass[1] == pytest.approx(0.7, abs=1e-9)


def test_u_shaped_is_highest_at_the_ends() -> None:
    """With a = 4 the density at an end is (1 + e^4) / (2 e^2), 3.76 times, that in the middle: read off the slope."""
    du = 1e-6
    u = torch.tensor([du, 2 * du, 0.5 - du / 2, 0.5 + du / 2], dtype=torch.float64)
    t = u_shaped(4.0)(u)
    at_end, in_middle = du / (t[1] - t[0]), du / (t[3] - t[2])
    assert float(at_end / in_middle) == pytest.approx((1 + math.exp(4)) / (2 * math.exp(2)), rel=1e-4)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "times", [uniform, logit_normal(-0.4, 1.1), u_shaped(4.0)], ids=["uniform", "logit_normal", "u_shaped"]
)
def test_shift_moves_the_logit(times: Times, shift: float) -> None:
    """``logit`` of the shifted time is that of the time plus ``ln shift``; above one, towards noise."""
    t, moved = times(U), shifted(times, shift)(U)
    # The logit's rounding is that of t over t (1 - t), 1e-16 / 1e-10 at the last uniforms.
    torch.testing.assert_close(torch.logit(moved), torch.logit(t) + math.log(shift), rtol=0, atol=2e-6)
    inner = (t > 1e-4) & (t < 1 - 1e-4)
    torch.testing.assert_close(torch.logit(moved)[inner], torch.logit(t)[inner] + math.log(shift), rtol=0, atol=1e-11)
    if shift > 1:
        assert (moved > t).all()


def test_shifted_logit_normal_is_a_logit_normal() -> None:
    """Of the mean moved by ``ln shift``."""
    moved = shifted(logit_normal(-0.4, 1.1), 3.0)(U)
    torch.testing.assert_close(moved, logit_normal(-0.4 + math.log(3.0), 1.1)(U), rtol=1e-12, atol=0)


KS_BOUND = 1.95 / math.sqrt(N)
"""The 0.1 % point of the Kolmogorov-Smirnov statistic. A shift of the mean by 0.015 deviations goes beyond it."""


@pytest.mark.parametrize(
    ("times", "distribution"),
    [
        (
            truncated_log_normal(-1.2, 1.2, 0.002, 80.0),
            lambda t: scipy.stats.truncnorm.cdf(
                (np.log(t / (1 - t)) + 1.2) / 1.2, (math.log(0.002) + 1.2) / 1.2, (math.log(80) + 1.2) / 1.2
            ),
        ),
        (u_shaped(4.0), lambda t: 0.5 + np.sinh(4 * (t - 0.5)) / (2 * math.sinh(2))),
        (shifted(uniform, 3.0), lambda t: t / (3 - 2 * t)),
    ],
    ids=["truncated_log_normal", "u_shaped", "shifted"],
)
def test_drawn_times_have_their_distribution(times: Times, distribution: object) -> None:
    """Keyed float32 draws against the distribution function, and against that of a neighbour, which they fail."""
    t = sample_times(times, Key(0), "time", torch.arange(N)).double().numpy()
    assert scipy.stats.kstest(t, distribution).statistic < KS_BOUND
    other = sample_times(shifted(times, 1.05), Key(0), "time", torch.arange(N)).double().numpy()
    assert scipy.stats.kstest(other, distribution).statistic > KS_BOUND


def test_times_are_keyed() -> None:
    """By seed, step, purpose and index; float32, one per sample."""
    index = torch.arange(50)
    t = sample_times(uniform, Key(1, 2), "time", index)
    assert t.dtype == torch.float32
    assert torch.equal(t, Key(1, 2).uniform("time", index).float())
    assert torch.equal(sample_times(uniform, Key(1, 2), "time", index[10:20]), t[10:20])
    for other in ((Key(2, 2), "time"), (Key(1, 3), "time"), (Key(1, 2), "second_time")):
        assert not torch.equal(sample_times(uniform, *other, index), t)


def test_pairs_are_in_order() -> None:
    """``r <= t``; off the jumps ``r = t`` to the bit, whatever was drawn; with a jump, ``r < t``."""
    index = torch.arange(2000)
    jump = jump_rows(index, 0.3)
    pairs = sorted_pairs(logit_normal(0.0, 1.0))(Key(5, 1), index, jump)
    assert pairs.t.dtype == pairs.r.dtype == torch.float32
    assert torch.equal(pairs.r[~jump], pairs.t[~jump])
    assert (pairs.r[jump] < pairs.t[jump]).all()
    # The time of a sample does not depend on whether it jumps.
    assert torch.equal(sorted_pairs(logit_normal(0.0, 1.0))(Key(5, 1), index, ~jump).t, pairs.t)


def test_pairs_are_the_larger_and_the_smaller_of_two_draws() -> None:
    """``P(t <= a) = F(a)^2`` and ``P(r <= a) = 1 - (1 - F(a))^2``; given ``t`` the smaller one has ``F(r) / F(t)``
    uniform and independent of ``t``: Kolmogorov-Smirnov at 0.1 %, correlation within four standard errors. One draw
    instead of two would give ``F(t)`` itself."""
    index = torch.arange(N)
    pairs = sorted_pairs(logit_normal(-0.4, 1.0))(Key(3), index, torch.ones(N, dtype=torch.bool))

    def F(t: Tensor) -> np.ndarray:
        return torch.special.ndtr(torch.logit(t.double()) + 0.4).numpy()

    larger, smaller = F(pairs.t), F(pairs.r)
    for u in (larger**2, 1 - (1 - smaller) ** 2, smaller / larger):
        assert scipy.stats.kstest(u, "uniform").statistic < KS_BOUND
    assert scipy.stats.kstest(larger, "uniform").statistic > 0.2
    assert abs(np.corrcoef(smaller / larger, larger)[0, 1]) < 4 / math.sqrt(N)


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
