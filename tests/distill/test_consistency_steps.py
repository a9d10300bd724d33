"""Which times the consistency family compares: schedules at named steps, grids, shares of the noise level, segments."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.distill.consistency.measures import noise_level, noise_step
from fewstep.distill.consistency.schedules import (
    Constant,
    Doubling,
    FollowingDecay,
    SquareRoot,
    Stages,
    WholeDoubling,
)
from fewstep.distill.consistency.steps import (
    ConstantSteps,
    GridSteps,
    Hop,
    LevelSteps,
    SegmentSteps,
    StageShare,
    TruncatedSteps,
    even_nodes,
    interval_masses,
    karras_nodes,
)
from fewstep.keys import Key
from fewstep.times import logit_normal, truncated_student

EXACT = {"rtol": 0.0, "atol": 1e-12}
KEY = Key(3, step=5)
INDEX = torch.arange(4000)


def chi_square(counts: Tensor, wanted: Tensor) -> float:
    return float(((counts - wanted) ** 2 / wanted).sum())


# ------------------------------------------------------------------------------------------------------- schedules


def test_the_grid_of_consistency_training_grows_with_a_root() -> None:
    """CIFAR-10's s0 = 2, s1 = 150, K = 800,000: N(0) = 2, N(K / 2) = ceil(sqrt(22,797 / 2 + 4) - 1) + 1 = 107,
    N(K) = 151 nodes, one less intervals; and never fewer than before."""
    intervals = SquareRoot(2, 150, 800_000)
    assert [intervals(k) + 1 for k in (0, 400_000, 800_000)] == [2, 107, 151]
    for k in range(0, 800_001, 12_345):
        # Over the integers: the least n with (n + 1)^2 >= k / K ((s1 + 1)^2 - s0^2) + s0^2.
        n = next(n for n in range(1, 151) if (n + 1) ** 2 * 800_000 >= k * (151**2 - 4) + 4 * 800_000)
        assert intervals(k) == n
    assert SquareRoot(1, 1, 10)(0) == 1


def test_targets_follow_a_finer_grid_more_slowly() -> None:
    """``mu = exp(s0 ln(mu0) / (N - 1))``: with s0 = 2 and mu0 = .9, .81 over one interval and .9980 over 106."""
    decay = FollowingDecay(0.9, 2, SquareRoot(2, 150, 800_000))
    assert decay(0) == pytest.approx(0.81)
    assert decay(400_000) == pytest.approx(0.9 ** (2 / 106))
    assert FollowingDecay(0.95, 4, Constant(4))(17) == pytest.approx(0.95)


def test_doubling_of_improved_consistency_training() -> None:
    """s0 = 10, s1 = 1280, K = 400,000: K' = 400,000 / 8 steps each, 11 to 1281 nodes. What does not divide stays with
    the last part, where equal parts are not of whole steps."""
    intervals = WholeDoubling(10, 1280, 400_000)
    steps = {0: 11, 49_999: 11, 50_000: 21, 99_999: 21, 100_000: 41, 349_999: 641, 350_000: 1281, 10**7: 1281}
    assert {k: intervals(k) + 1 for k in steps} == steps
    assert [k for k in range(1, 100) if WholeDoubling(4, 16, 100)(k) > WholeDoubling(4, 16, 100)(k - 1)] == [33, 66]
    assert [k for k in range(1, 100) if Doubling(4, 16, 100)(k) > Doubling(4, 16, 100)(k - 1)] == [34, 67]
    assert WholeDoubling(4, 64, 2)(1) == 8  # fewer steps than parts: one each


def test_stages() -> None:
    """Eight of 25,000 steps in 200,000; the last goes on."""
    stage = Stages(8, 200_000)
    assert [stage(k) for k in (0, 24_999, 25_000, 199_999, 200_000, 10**6)] == [0, 0, 1, 7, 7, 7]


# ------------------------------------------------------------------------------------------------------------ grids


def test_karras_grid() -> None:
    """80 to .002 with rho = 7; at the ends t = 1, where sampling starts, and 0. Of 18 nodes the second and the
    ninth."""
    t, sigma = karras_nodes(17)
    assert [float(sigma[i]) for i in (0, 17)] == pytest.approx([80.0, 0.002], rel=1e-12)
    for i in (1, 8):
        wanted = (80 ** (1 / 7) * (17 - i) / 17 + 0.002 ** (1 / 7) * i / 17) ** 7
        assert float(sigma[i]) == pytest.approx(wanted, rel=1e-12)
        assert float(t[i]) == pytest.approx(wanted / (1 + wanted), rel=1e-12)
    assert (float(t[0]), float(t[-1])) == (1.0, 0.0)
    assert (t.diff() < 0).all()


def test_log_normal_intervals() -> None:
    """``erf((ln s_i - m) / (sqrt 2 s)) - erf((ln s_{i+1} - m) / (sqrt 2 s))`` up to a factor, and drawn so: chi-square
    of 16 classes below its 0.1 % point. On the uniform grid the ends have noise levels without bound and zero."""
    _, sigma = karras_nodes(16)
    edges = torch.erf((sigma.log() + 1.1) / (math.sqrt(2) * 2.0))
    masses = interval_masses(sigma, -1.1, 2.0)
    torch.testing.assert_close(masses / masses.sum(), (edges[:-1] - edges[1:]) / (edges[0] - edges[-1]), **EXACT)
    hop = GridSteps(karras_nodes, Constant(16), (-1.1, 2.0))(KEY, INDEX)
    t, _ = karras_nodes(16)
    counts = (hop.t[:, None] == t[:-1]).double().sum(0)
    assert chi_square(counts, masses / masses.sum() * len(INDEX)) < 37.7
    assert torch.equal((hop.q[:, None] == t[1:]).double().sum(0), counts)
    assert float(interval_masses(even_nodes(8)[1], 0.0, 1.0).sum()) == pytest.approx(1.0, abs=1e-12)


def test_the_grid_of_the_step_is_used() -> None:
    steps = GridSteps(even_nodes, Doubling(2, 8, 30))
    for step, count in ((0, 2), (10, 4), (20, 8)):
        hop = steps(Key(0, step), INDEX)
        assert sorted({*hop.t.tolist()}) == [(k + 1) / count for k in range(count)]
        assert torch.equal(hop.t - hop.q, torch.full_like(hop.t, 1 / count))
        assert not hop.b.any()


# ---------------------------------------------------------------------------------------- shares of the noise level


def test_step_of_easy_consistency_tuning() -> None:
    """``r / sigma = 1 - n(sigma) / q^(stage + 1)``, ``n = 1 + 8 sigmoid(-sigma)``; nothing in the first stages, and at
    most ``largest`` of it for large noise, where n = 1."""
    share = StageShare(Stages(8, 800), base=2.0, largest=0.999)
    assert [share(k) for k in (0, 100, 799)] == [1 / 2, 1 / 4, 1 / 256]
    assert StageShare(Stages(1, 1), base=4096.0, largest=0.999)(0) == pytest.approx(1e-3)
    steps = LevelSteps(logit_normal(-1.1, 2.0), share)
    sigma = torch.tensor([0.01, 1.0, 20.0, 1e4], dtype=torch.float64)
    t = sigma / (1 + sigma)
    for step, a in ((0, 1 / 2), (300, 1 / 16), (799, 1 / 256)):
        n = 1 + 8 / (1 + torch.exp(sigma))
        wanted = sigma * (1 - n * a).clamp(min=0)
        q = steps.nearer(t, step)
        torch.testing.assert_close(q / (1 - q), wanted, rtol=1e-9, atol=0)
        # The same in flow time: alpha = share / (1 + sigma (1 - share)) of what is left.
        gone = (n * a).clamp(max=1)
        torch.testing.assert_close(q, t * (1 - gone / (1 + sigma * (1 - gone))), rtol=0, atol=1e-12)
    assert steps.nearer(t[:2], 0).tolist() == [0.0, 0.0]
    assert float(steps.nearer(t[3:], 0)) == pytest.approx(5e3 / 5001, abs=1e-6)
    hop = steps(Key(1, 300), INDEX)
    assert torch.equal(hop.t, logit_normal(-1.1, 2.0)(Key(1, 300).uniform("time", INDEX)))
    assert torch.equal(hop.q, steps.nearer(hop.t, 300))


def test_truncated_steps() -> None:
    """A quarter of the rows at the boundary, the others above it; the factors weigh the two means 0.1 to 1, whatever
    the shares; every target of a boundary row lies below it."""
    levels = LevelSteps(truncated_student(0.01, 0.2, 1.0, 80.0), lambda step: 1 / 32)
    for fraction in (0.25, 0.5):
        hop = TruncatedSteps(levels, 0.5, fraction, 0.1)(KEY, INDEX)
        there = hop.t == 0.5
        assert int(there.sum()) == fraction * len(INDEX)
        assert float(hop.t.min()) == 0.5
        assert float(hop.t.max()) <= 80 / 81
        assert (hop.q[there] < 0.5).all()
        torch.testing.assert_close(hop.q, levels.nearer(hop.t, 5), **EXACT)
        assert hop.factor is not None
        loss = torch.where(there, 7.0, 3.0)
        assert float((hop.factor * loss).mean()) == pytest.approx(3.0 + 0.1 * 7.0)


# ----------------------------------------------------------------------------------------------------------- segments


def test_one_segment_is_the_uniform_grid() -> None:
    a, b = SegmentSteps((1,), 16)(KEY, INDEX), GridSteps(even_nodes, Constant(16))(KEY, INDEX)
    for ours, theirs in ((a.t, b.t), (a.q, b.q), (a.b, b.b)):
        assert torch.equal(ours.float(), theirs)


@pytest.mark.parametrize("counts", [(4,), (4, 5, 6, 7, 8), (3, 10)])
def test_segments(counts: tuple[int, ...]) -> None:
    """Every sample stays inside a segment of one of the grids, all of which are drawn; every start of a segment is a
    node, at least as many as asked for; all nodes of a grid alike."""
    hop = SegmentSteps(counts, 10)(KEY, INDEX)
    drawn = torch.tensor(counts)[(KEY.uniform("count", INDEX) * len(counts)).long()]
    assert set(drawn.tolist()) == set(counts)
    end = (torch.ceil(hop.t * drawn - 1e-9) - 1) / drawn
    torch.testing.assert_close(hop.b, end, **EXACT)
    assert (hop.b <= hop.q).all()
    assert (hop.q < hop.t).all()
    for count in counts:
        total = count * math.ceil(10 / count)
        nodes = (hop.t[drawn == count] * total).round()
        assert {*nodes.int().tolist()} == {*range(1, total + 1)}
        torch.testing.assert_close(nodes / total - hop.q[drawn == count], torch.full_like(nodes, 1 / total), **EXACT)


def test_ends_that_shrink() -> None:
    """Uniform between the segment's end and .3 of it less; those at data stay there."""
    plain, hop = (SegmentSteps((2, 4), 8, shrink)(KEY, INDEX) for shrink in (0.0, 0.3))
    assert torch.equal(hop.t, plain.t)
    assert torch.equal(hop.q, plain.q)
    ratio = (hop.b / plain.b)[plain.b > 0]
    assert float(ratio.min()) == pytest.approx(0.7, abs=1e-3)
    assert float(ratio.max()) == pytest.approx(1.0, abs=1e-3)
    assert float(ratio.mean()) == pytest.approx(0.85, abs=4 * 0.3 / math.sqrt(12 * len(ratio)))
    assert not hop.b[plain.b == 0].any()


def test_constant_steps() -> None:
    """``q = t - length``; the segment's end where that is beyond it, or near data."""
    hop = ConstantSteps(4, 0.01, near_data=0.1)(KEY, INDEX)
    torch.testing.assert_close(hop.b, (hop.t * 4).floor() / 4, **EXACT)
    jumps = (hop.t - 0.01 <= hop.b) | (hop.t - 0.01 < 0.1)
    assert 0.1 < float(jumps.double().mean()) < 0.2
    torch.testing.assert_close(hop.q, torch.where(jumps, hop.b, hop.t - 0.01), **EXACT)
    straight = ConstantSteps(4, 0.01, near_data=1.0)(KEY, INDEX)
    assert torch.equal(straight.q, straight.b)


def test_noise_levels() -> None:
    """``t / (1 - t)`` up to 80, and on from there without a break; a step of it is positive up to t = 1."""
    t = torch.tensor([0.0, 0.002 / 1.002, 0.5, 80 / 81, 1.0], dtype=torch.float64)
    torch.testing.assert_close(noise_level(t), torch.tensor([0, 0.002, 1, 80, 81], dtype=torch.float64), **EXACT)
    hop = Hop(torch.tensor([1.0, 0.5]), torch.tensor([0.995, 0.25]), torch.zeros(2))
    torch.testing.assert_close(noise_step(hop), torch.tensor([81 * 0.005, 1 - 1 / 3]), rtol=1e-4, atol=0)
