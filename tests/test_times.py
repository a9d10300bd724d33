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
    Pairs,
    TimePairs,
    Times,
    _by_halving,
    clipped_pairs,
    distribution,
    dyadic_pairs,
    gap_pairs,
    jump_rows,
    logit_normal,
    sample_times,
    shifted,
    sorted_pairs,
    truncated_log_normal,
    truncated_student,
    u_shaped,
    uniform,
    with_diagonal,
)

KEY = Key(3)
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


# Pairs of other kinds ------------------------------------------------------------------------------------------------


class Given:
    """A key whose uniform numbers are those of a table, by purpose."""

    def __init__(self, **numbers: Tensor) -> None:
        self.numbers = numbers

    def uniform(self, purpose: str, index_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        return self.numbers[purpose]


def all_jump(pairs: Pairs, key: Key = KEY) -> TimePairs:
    return pairs(key, torch.arange(N), torch.ones(N, dtype=torch.bool))


def normal_distribution(t: Tensor, mean: float, std: float) -> np.ndarray:
    """Of ``logit t``."""
    return torch.special.ndtr((torch.logit(t.double()) - mean) / std).numpy()


KINDS: dict[str, Pairs] = {
    "sorted": sorted_pairs(logit_normal(0.2, 0.8), logit_normal(-1.0, 0.8)),
    "clipped": clipped_pairs(logit_normal(-0.6, 1.6), logit_normal(-4.0, 1.6)),
    "gap": gap_pairs(logit_normal(-0.8, 1.0), logit_normal(-0.4, 1.0)),
    "dyadic": dyadic_pairs(7),
    "with diagonal": with_diagonal(sorted_pairs(uniform), logit_normal(-0.2, 1.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pairs_is_in_order_and_keyed(kind: str) -> None:
    """``0 <= r <= t <= 1`` in float32; off the jumps ``r = t`` to the bit; a row's pair is its own."""
    index = torch.arange(4000)
    jump = jump_rows(index, 0.3)
    pairs = KINDS[kind](Key(5, 1), index, jump)
    assert pairs.t.dtype == pairs.r.dtype == torch.float32
    assert ((pairs.r >= 0) & (pairs.r <= pairs.t) & (pairs.t <= 1)).all()
    assert torch.equal(pairs.r[~jump], pairs.t[~jump])
    assert float((pairs.r < pairs.t)[jump].double().mean()) > (0.9 if kind == "clipped" else 0.999)
    some = torch.tensor([17, 3, 2500])
    part = KINDS[kind](Key(5, 1), some, jump[some])
    assert torch.equal(part.t, pairs.t[some])
    assert torch.equal(part.r, pairs.r[some])
    for other in (Key(6, 1), Key(5, 2)):
        assert float((KINDS[kind](other, index, jump).t != pairs.t).double().mean()) > 0.8


def test_two_distributions_sorted() -> None:
    """``P(t <= a) = F(a) G(a)`` and ``P(r > a) = (1 - F(a)) (1 - G(a))``, at 0.1 %; with one distribution they would be
    others."""
    pairs = all_jump(KINDS["sorted"])
    for t, of in ((pairs.t, "largest"), (pairs.r, "smallest")):
        F, G = normal_distribution(t, 0.2, 0.8), normal_distribution(t, -1.0, 0.8)
        wanted = F * G if of == "largest" else 1 - (1 - F) * (1 - G)
        assert scipy.stats.kstest(wanted, "uniform").statistic < KS_BOUND
        assert scipy.stats.kstest(F**2 if of == "largest" else 1 - (1 - F) ** 2, "uniform").statistic > 0.1


def test_clipped_pairs_are_two_draws_and_the_second_cut_off() -> None:
    """``t`` is the first draw, with a jump or without; ``r`` is the second one where that is smaller, else ``t``."""
    start, end = logit_normal(-0.6, 1.6), logit_normal(-4.0, 1.6)
    index = torch.arange(N)
    jump = jump_rows(index, 0.75)
    pairs = clipped_pairs(start, end)(KEY, index, jump)
    t, second = sample_times(start, KEY, "time", index), sample_times(end, KEY, "second_time", index)
    assert torch.equal(pairs.t, t)
    assert torch.equal(pairs.r[jump], torch.minimum(t, second)[jump])
    cut = float((second > t)[jump].double().mean())
    # Two normals 3.4 apart of standard deviation 1.6 each.
    expected = scipy.stats.norm.sf(3.4 / (1.6 * math.sqrt(2)))
    assert cut == pytest.approx(expected, abs=4 * math.sqrt(expected / int(jump.sum())))
    for part in (pairs.t[jump], pairs.t[~jump]):
        u = normal_distribution(part, -0.6, 1.6)
        assert scipy.stats.kstest(u, "uniform").statistic < 1.95 / math.sqrt(len(part))


def test_gaps_have_the_distribution_asked_for() -> None:
    """Exactly that, whatever ``r``; and given the gap ``l`` the end has ``F(r) / F(1 - l)`` uniform and independent of
    it. (Sorted or clipped draws would cut long gaps short.)"""
    pairs = all_jump(KINDS["gap"])
    gap = pairs.t.double() - pairs.r.double()
    of_gap = normal_distribution(gap, -0.8, 1.0)
    assert scipy.stats.kstest(of_gap, "uniform").statistic < KS_BOUND
    conditional = normal_distribution(pairs.r, -0.4, 1.0) / normal_distribution(1 - gap, -0.4, 1.0)
    assert scipy.stats.kstest(conditional, "uniform").statistic < KS_BOUND
    assert abs(np.corrcoef(conditional, of_gap)[0, 1]) < 4 / math.sqrt(N)
    for low, high in ((0.0, 0.1), (0.9, 1.0)):  # also among the shortest and the longest
        some = conditional[(of_gap > low) & (of_gap <= high)]
        assert scipy.stats.kstest(some, "uniform").statistic < 1.95 / math.sqrt(len(some))
    # Where r would be drawn without regard to the gap it is another one.
    assert scipy.stats.kstest(normal_distribution(pairs.r, -0.4, 1.0), "uniform").statistic > 0.1


@pytest.mark.parametrize(
    "end", [uniform, logit_normal(-0.4, 1.0), logit_normal(3.0, 0.5), u_shaped(4.0)], ids=["uniform", "a", "b", "u"]
)
@pytest.mark.parametrize(
    "gap", [uniform, logit_normal(-0.8, 1.0), logit_normal(4.0, 2.0), u_shaped(20.0)], ids=["uniform", "a", "b", "u"]
)
def test_gaps_stay_inside_at_any_uniforms(gap: Times, end: Times) -> None:
    """``r >= 0``, ``t <= 1``, and the gap is the drawn one to the rounding of float32, with both uniforms at their
    ends: where ``r`` has next to no room as well."""
    first, second = (part.flatten() for part in torch.meshgrid(U, U[::50], indexing="ij"))
    key = Given(time=first, second_time=second)
    jump = torch.ones(len(first), dtype=torch.bool)
    pairs = gap_pairs(gap, end)(key, torch.arange(len(first)), jump)  # type: ignore[arg-type]
    assert pairs.t.isfinite().all()
    assert ((pairs.r >= 0) & (pairs.r <= pairs.t) & (pairs.t <= 1)).all()
    torch.testing.assert_close(pairs.t.double() - pairs.r.double(), gap(first), rtol=0, atol=1.2e-7)
    still = gap_pairs(gap, end)(key, torch.arange(len(first)), ~jump)  # type: ignore[arg-type]
    assert torch.equal(still.t, pairs.t)
    assert torch.equal(still.r, pairs.t)


@pytest.mark.parametrize("levels", [1, 4, 7, 20])
def test_dyadic_steps(levels: int) -> None:
    """Lengths ``2^-k`` equally often (chi-square at 0.1 %), ``t`` any multiple of its length up to 1, equally often,
    and ``r = t - d``: all exact in float32, powers of two being so."""
    pairs = all_jump(dyadic_pairs(levels))
    d = pairs.t - pairs.r
    level = -d.log2()
    assert torch.equal(level, level.round())
    assert torch.equal(pairs.r + d, pairs.t)
    multiple = pairs.t.double() / d.double()
    assert torch.equal(multiple, multiple.round())
    assert (multiple >= 1).all()
    assert (pairs.t <= 1).all()
    counts = torch.bincount(level.long(), minlength=levels)
    assert len(counts) == levels
    expected = N / levels
    assert float(((counts - expected) ** 2 / expected).sum()) <= scipy.stats.chi2.isf(1e-3, max(levels - 1, 1))
    for k in range(min(levels, 4)):
        places = torch.bincount(multiple[level == k].long() - 1, minlength=2**k)
        assert len(places) == 2**k
        expected = float(places.sum()) / 2**k
        assert float(((places - expected) ** 2 / expected).sum()) <= scipy.stats.chi2.isf(1e-3, max(2**k - 1, 1))


def test_dyadic_rows_that_do_not_jump_are_uniform() -> None:
    still = dyadic_pairs(7)(KEY, torch.arange(N), torch.zeros(N, dtype=torch.bool))
    assert torch.equal(still.t, still.r)
    assert scipy.stats.kstest(still.t.numpy(), "uniform").statistic < KS_BOUND
    ends = Given(level=U, time=U.flip(0))
    pairs = dyadic_pairs(7)(ends, torch.arange(len(U)), torch.ones(len(U), dtype=torch.bool))  # type: ignore[arg-type]
    assert ((pairs.r >= 0) & (pairs.t <= 1) & (pairs.t - pairs.r >= 2**-6)).all()


def test_a_distribution_of_their_own_for_times_without_a_jump() -> None:
    """Jumps are those of the pairs; the others have the other distribution, also where they would have jumped."""
    index = torch.arange(N)
    jump = jump_rows(index, 0.25)
    base, diagonal = sorted_pairs(uniform), logit_normal(-0.2, 1.0)
    pairs = with_diagonal(base, diagonal)(KEY, index, jump)
    jumps = base(KEY, index, jump)
    assert torch.equal(pairs.t[jump], jumps.t[jump])
    assert torch.equal(pairs.r[jump], jumps.r[jump])
    assert torch.equal(pairs.t[~jump], sample_times(diagonal, KEY, "diagonal_time", index)[~jump])
    u = normal_distribution(pairs.t[~jump], -0.2, 1.0)
    assert scipy.stats.kstest(u, "uniform").statistic < 1.95 / math.sqrt(len(u))
    assert abs(np.corrcoef(u, jumps.t[~jump].numpy())[0, 1]) < 4 / math.sqrt(len(u))


ALL_TIMES: dict[str, Times] = {
    "uniform": uniform,
    "logit_normal": logit_normal(-0.4, 1.0),
    "narrow": logit_normal(2.0, 0.1),
    "truncated": truncated_log_normal(-1.2, 1.2, 0.002, 80.0),
    "u_shaped": u_shaped(4.0),
    "shifted": shifted(logit_normal(0.0, 1.0), 3.0),
}


@pytest.mark.parametrize("name", ALL_TIMES)
def test_distribution_is_the_inverse_of_every_times(name: str) -> None:
    """``F(times(u)) = u`` to 1e-9, and 0 and 1 outside of the range."""
    times = ALL_TIMES[name]
    torch.testing.assert_close(distribution(times, times(U)), U, rtol=0, atol=1e-9)
    ends = distribution(times, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)
    if name == "truncated":
        beyond = torch.tensor([0.001, 0.99], dtype=torch.float64)
        torch.testing.assert_close(distribution(times, beyond), torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "narrow", "shifted"])
def test_closed_forms_are_what_halving_finds(name: str) -> None:
    """To 1e-12 relative, from 1e-12 to as near to one."""
    near = torch.logspace(-12, -0.31, 200, dtype=torch.float64)
    t = torch.cat((near, 1 - near))
    wanted = _by_halving(ALL_TIMES[name], t)
    kept = wanted > 1e-290
    assert kept.sum() > 200
    torch.testing.assert_close(distribution(ALL_TIMES[name], t)[kept], wanted[kept], rtol=1e-12, atol=0)
    assert (distribution(ALL_TIMES[name], t)[~kept] < 1e-289).all()


@pytest.mark.parametrize("deviations", [-35.0, -20.0, -9.0])
def test_distribution_keeps_its_digits_in_a_tail(deviations: float) -> None:
    """To 1e-10 of values from 1e-19 to 1e-268, against scipy's: a jump that leaves its end next to no room still has a
    distribution of ends there, and not one of them at the limit."""
    t = torch.sigmoid(torch.tensor([-0.4 + deviations], dtype=torch.float64))
    found = distribution(logit_normal(-0.4, 1.0), t)
    assert float(found) == pytest.approx(scipy.stats.norm.cdf(deviations), rel=1e-10)
    r = logit_normal(-0.4, 1.0)(U * found)
    assert (r <= t * (1 + 1e-12)).all()
    assert (r[1:] > r[:-1]).all()


@pytest.mark.parametrize(
    ("degrees", "scale", "low", "high"), [(0.01, 0.2, 1.0, 80.0), (3.0, 0.5, 0.1, 20.0), (1.0, 1.0, 1e-3, 1e-2)]
)
def test_truncated_student_is_its_inverse_distribution_function(
    degrees: float, scale: float, low: float, high: float
) -> None:
    """The distribution function by quadrature of the density, given the bounds, takes the times back to the
    uniforms."""
    u = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1]
    t = truncated_student(degrees, scale, low, high)(u)
    assert (t[1:] > t[:-1]).all()

    def mass(to: float) -> float:
        # In ln sigma / scale = sinh(y), which spreads the peak at zero.
        def density(y: float) -> float:
            return float((1 + math.sinh(y) ** 2 / degrees) ** (-(degrees + 1) / 2) * math.cosh(y))

        ends = (math.asinh(math.log(end) / scale) for end in (low, to))
        return float(scipy.integrate.quad(density, *ends, epsabs=1e-12, limit=400)[0])

    found = [mass(sigma) / mass(high) for sigma in (t / (1 - t)).tolist()]
    assert found == pytest.approx(u.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="noise levels run from sigma_min"):
        truncated_student(degrees, scale, high, low)
