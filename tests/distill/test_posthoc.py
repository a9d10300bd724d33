"""Averages rebuilt after training: profiles against quadrature, and weights against averages that were tracked."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from fewstep.checkpoint import Tensors
from fewstep.distill.config import PowerEMA
from fewstep.distill.ema import EMA, power_exponent
from fewstep.distill.posthoc import (
    Profile,
    profile_error,
    profile_inner_product,
    reconstruct,
    reconstruction_weights,
)

TRACKED = (0.05, 0.1)
STEPS = 2000


def every(spacing: int, steps: int = STEPS, widths: tuple[float, ...] = TRACKED) -> list[Profile]:
    return [(step, width) for step in range(spacing, steps + 1, spacing) for width in widths]


def profile(tau: np.ndarray, step: int, gamma: float) -> np.ndarray:
    return np.where(tau <= step, (gamma + 1) / step * (tau / step) ** gamma, 0.0)


# ----------------------------------------------------------------------------------------------------------- profiles


@pytest.mark.parametrize(
    ("a", "b"),
    [((100, 6.94), (100, 6.94)), ((100, 6.94), (37, 16.97)), ((37, 16.97), (100, 6.94)), ((5, 0.0), (2000, 3.5))],
)
def test_inner_products_by_quadrature(a: tuple[int, float], b: tuple[int, float]) -> None:
    integral, _ = quad(
        lambda tau: float(profile(tau, *a) * profile(tau, *b)), 0, min(a[0], b[0]), epsabs=0, epsrel=1e-12
    )
    assert float(profile_inner_product(*a, *b)) == pytest.approx(integral, rel=1e-10)


def test_inner_products_of_long_runs() -> None:
    """Powers of a million steps would overflow; of a far shorter run next to nothing is shared."""
    million = float(profile_inner_product(10**6, 500.0, 10**6, 500.0))
    assert million == pytest.approx(501**2 / 1001 / 1e6, rel=1e-12)
    assert float(profile_inner_product(1, 500.0, 10**6, 500.0)) == 0


SNAPSHOTS = every(100)
TARGETS: tuple[Profile, ...] = ((2000, 0.07), (1200, 0.07), (1500, 0.15), (2000, 0.04))


@pytest.mark.parametrize("target", TARGETS)
def test_weights_are_least_squares_of_sum_one(target: Profile) -> None:
    """On a grid of cells: the error is what it says, and orthogonal to every change that keeps the sum."""
    weights = reconstruction_weights(SNAPSHOTS, target)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    edges = np.linspace(0, STEPS, 40 * STEPS + 1)
    tau = (edges[1:] + edges[:-1]) / 2
    kept = np.stack([profile(tau, step, power_exponent(width)) for step, width in SNAPSHOTS])
    wanted = profile(tau, target[0], power_exponent(target[1]))
    rest = weights @ kept - wanted
    error = math.sqrt((rest @ rest) / (wanted @ wanted))
    assert profile_error(SNAPSHOTS, weights, target) == pytest.approx(error, rel=1e-3)
    assert 1e-4 < error < 0.05
    slopes = kept @ rest
    assert np.ptp(slopes) < 1e-2 * abs(slopes).max()
    # Without the constraint the profile would be hardly nearer.
    free = np.linalg.lstsq(kept.T, wanted, rcond=None)[0]
    assert np.linalg.norm(free @ kept - wanted) > 0.95 * np.linalg.norm(rest)


@pytest.mark.parametrize("tracked", [(2000, 0.1), (2000, 0.05), (1000, 0.05), (100, 0.1)])
def test_a_tracked_profile_is_exact(tracked: Profile) -> None:
    weights = reconstruction_weights(SNAPSHOTS, tracked)
    assert profile_error(SNAPSHOTS, weights, tracked) < 1e-7
    np.testing.assert_allclose(weights, [float(each == tracked) for each in SNAPSHOTS], atol=1e-9)


def test_the_same_profile_twice() -> None:
    """A singular system: the weights of both add up to those of one."""
    once = reconstruction_weights(SNAPSHOTS, (1200, 0.07))
    twice = reconstruction_weights([*SNAPSHOTS, *SNAPSHOTS], (1200, 0.07)).reshape(2, -1)
    np.testing.assert_allclose(twice.sum(0), once, atol=1e-8)
    assert abs(twice).sum() == pytest.approx(abs(once).sum(), abs=1e-8)


def test_weights_stay_small_with_many_snapshots() -> None:
    """Where the system is worst conditioned, of three widths and 150 steps, rounding is not multiplied by much."""
    snapshots = every(20, 3000, (0.05, 0.07, 0.1))
    for target in ((3000, 0.06), (1500, 0.08), (3000, 0.15)):
        weights = reconstruction_weights(snapshots, target)
        assert abs(weights).sum() < 8
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert profile_error(snapshots, weights, target) < 1e-4


def test_what_cannot_be_rebuilt_is_refused() -> None:
    with pytest.raises(ValueError, match="step 2001 cannot be rebuilt: the last snapshot is of step 2000"):
        reconstruction_weights(SNAPSHOTS, (2001, 0.07))
    # Too narrow, too wide, and a step between two snapshots, where no profile kept ends.
    for target, off in (((2000, 0.01), "30.0%"), ((2000, 0.28), "18.1%"), ((1250, 0.07), "35.1%")):
        with pytest.raises(ValueError, match=f"relative_std {target[1]} at step {target[0]}: .* off by {off} .*, 5.0%"):
            reconstruction_weights(SNAPSHOTS, target)
    rough = reconstruction_weights(SNAPSHOTS, (1250, 0.07), max_profile_error=0.5)
    assert profile_error(SNAPSHOTS, rough, (1250, 0.07)) == pytest.approx(0.351, abs=1e-3)
    with pytest.raises(ValueError, match="no snapshots"):
        reconstruction_weights([], (2000, 0.07))
    for snapshots, target in ((SNAPSHOTS, (0, 0.07)), ([(0, 0.05), *SNAPSHOTS], (2000, 0.07))):
        with pytest.raises(ValueError, match="exist from step 1 on"):
            reconstruction_weights(snapshots, target)


# ------------------------------------------------------------------------------------------------------------ tensors


def test_sums_are_taken_in_float64() -> None:
    """In float32 the third snapshot would drown in the first two; types come back, counters are the last's."""
    x, y = torch.full((3,), 1 / 3), torch.tensor([1.0, 2.0, 3.0])
    states = [{"w": w, "h": w.half(), "n": torch.tensor(n)} for n, w in ((1, x), (2, x), (7, y))]
    rebuilt = reconstruct(iter(states), np.array([1e9, -1e9, 1.0]))
    assert list(rebuilt) == ["w", "h", "n"]
    assert rebuilt["w"].dtype == torch.float32
    assert rebuilt["h"].dtype == torch.float16
    torch.testing.assert_close(rebuilt["w"], y, rtol=0, atol=1e-6)
    torch.testing.assert_close(rebuilt["h"], y.half(), rtol=0, atol=1e-3)
    assert torch.equal(rebuilt["n"], torch.tensor(7))
    assert torch.equal(states[0]["w"], torch.full((3,), 1 / 3))


def test_snapshots_have_to_agree() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="snapshots differ in b"):
        reconstruct([{"a": one, "b": one}, {"a": one}], [0.5, 0.5])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        reconstruct([{"a": one}], [0.5, 0.5])


# ----------------------------------------------------------------------------------------------------- whole trajectory


def trained_network() -> Iterator[nn.Module]:
    """Adam at a constant rate on a regression: the weights after each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    yield net
    for _ in range(STEPS):
        x = torch.rand(32, 2) * 4 - 2
        loss = (net(x) - torch.sin(2 * x[:, :1]) * x[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield net


def noisy_path() -> Iterator[nn.Module]:
    """Drift, oscillations of up to six periods, and noise of a twentieth of the weights at every step."""
    random = torch.Generator().manual_seed(0)
    net = nn.Linear(8, 8, bias=False)
    start, drift, phase = torch.randn(3, 8, 8, generator=random)
    periods = 0.5 + 5.5 * torch.rand(8, 8, generator=random)
    yield net
    for step in range(1, STEPS + 1):
        t = step / STEPS
        wave = 0.3 * torch.sin(2 * math.pi * periods * t + phase)
        net.weight.data = start + drift * t**0.5 + wave + 0.05 * torch.randn(8, 8, generator=random)
        yield net


PATHS: dict[str, Callable[[], Iterator[nn.Module]]] = {"adam": trained_network, "noise": noisy_path}
UNTRACKED: tuple[Profile, ...] = ((2000, 0.07), (1200, 0.07), (1200, 0.15))


@cache
def averages(path: str) -> dict[Profile, Tensors]:
    """The states of both tracked averages every 50 steps, and the untracked ones at their step."""
    states: dict[Profile, Tensors] = {}
    emas: list[EMA] = []
    for step, net in enumerate(PATHS[path]()):
        if step == 0:
            emas = [EMA(net, PowerEMA(relative_std=std)) for std in (*TRACKED, 0.07, 0.15)]
            continue
        for ema in emas:
            ema.update()
            at = (step, ema.config.relative_std)
            if at in UNTRACKED or (step % 50 == 0 and at[1] in TRACKED):
                states[at] = {name: value.clone() for name, value in ema.state().items()}
    return states


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in tensors.values()])


def distances(path: str, target: Profile, spacing: int) -> tuple[float, float]:
    """From the rebuilt average to the tracked one, relative to the weights and to how far the two widths that were
    kept are apart at that step."""
    states = averages(path)
    snapshots = every(spacing)
    weights = reconstruction_weights(snapshots, target, max_profile_error=0.2)
    rebuilt = flat(reconstruct((states[each] for each in snapshots), weights))
    wanted = flat(states[target])
    error = float((rebuilt - wanted).norm())
    narrow, wide = (flat(states[target[0], width]) for width in TRACKED)
    return error / float(wanted.norm()), error / float((narrow - wide).norm())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", UNTRACKED)
def test_an_untracked_average_is_rebuilt(path: str, target: Profile) -> None:
    """From snapshots at 40 steps, at the end and before it, within 1e-4 of the weights; the widths that were kept are
    more than a hundred times further apart."""
    of_weights, of_spread = distances(path, target, 50)
    assert of_weights < 1e-4
    assert of_spread < 1e-2
    assert of_weights / of_spread > 1e-2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", UNTRACKED)
def test_more_snapshots_bring_it_nearer(path: str, target: Profile) -> None:
    """At least twice as near for each halving of their spacing, and the profile's error bounds how near."""
    errors = []
    for spacing in (400, 200, 100, 50):
        snapshots = every(spacing)
        predicted = profile_error(snapshots, reconstruction_weights(snapshots, target, max_profile_error=0.2), target)
        _, of_spread = distances(path, target, spacing)
        errors.append(of_spread)
        assert of_spread < 5 * predicted
    assert all(later < earlier / 2 for earlier, later in pairwise(errors))
