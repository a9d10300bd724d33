"""Time grids: closed forms, nesting, and what is no grid."""

import math
from itertools import pairwise

import pytest
import torch

from fewstep.flow import COSINE, TimeDomain, uniform_grid
from fewstep.grids import check_grid, cosine_nodes, shifted_nodes, thinned, uniform_nodes

MAKERS = {
    "uniform": uniform_nodes,
    "shifted": lambda steps: shifted_nodes(steps, 3.0),
    "to data": lambda steps: shifted_nodes(steps, 0.2),
    "cosine": cosine_nodes,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 12, 64, 1024])
def test_every_kind_is_a_grid_that_nests(kind: str, steps: int) -> None:
    """From 1 to 0 exactly, and the grid of half the steps is each second node, to the bit."""
    grid = MAKERS[kind](steps)
    check_grid(grid)
    assert len(grid) == steps + 1
    assert thinned(MAKERS[kind](2 * steps), steps) == pytest.approx(grid, abs=1e-15)
    if steps & (steps - 1) == 0:
        assert MAKERS[kind](2 * steps)[::2] == grid
    assert torch.equal(torch.tensor(uniform_nodes(steps)), uniform_grid(steps))


def test_a_shift_adds_to_the_log_noise_level() -> None:
    """``logit t' = logit t + ln a``, so that a shift of one is none and two shifts multiply."""
    for a in (0.2, 3.0):
        for t, moved in zip(uniform_nodes(16)[1:-1], shifted_nodes(16, a)[1:-1], strict=True):
            assert math.log(moved / (1 - moved)) == pytest.approx(math.log(t / (1 - t)) + math.log(a), abs=1e-12)
    assert shifted_nodes(16, 1.0) == uniform_nodes(16)


def test_the_cosine_grid_is_uniform_in_the_angle() -> None:
    """``tan phi = t / (1 - t)``, the clock of the cosine path; symmetric, since data and noise trade places."""
    grid = cosine_nodes(12)
    angles = [math.atan2(t, 1 - t) for t in grid]
    for a, b in pairwise(angles):
        assert a - b == pytest.approx(math.pi / 24, abs=1e-12)
    clock = COSINE.time_at(torch.tensor(grid, dtype=torch.float64))
    torch.testing.assert_close(clock, uniform_grid(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert [1 - t for t in reversed(grid)] == pytest.approx(grid, abs=1e-12)


def test_thinning() -> None:
    grid = (1.0, 0.9, 0.5, 0.3, 0.0)
    assert thinned(grid, 4) == grid
    assert thinned(grid, 2) == (1.0, 0.5, 0.0)
    assert thinned(grid, 1) == (1.0, 0.0)
    for steps in (0, 3, 8):
        with pytest.raises(ValueError, match=f"a grid of 4 steps does not thin to {steps}"):
            thinned(grid, steps)


NO_GRID = {
    "empty": ((), "from t = 1 to t = 0, got no nodes"),
    "one node": ((1.0,), "got 1"),
    "not from noise": ((0.9, 0.0), "got 0.9, 0"),
    "not to data": ((1.0, 0.5, 0.1), "got 1, 0.5, 0.1"),
    "rising": ((1.0, 0.4, 0.5, 0.0), "got 0.4 and then 0.5"),
    "standing": ((1.0, 0.5, 0.5, 0.0), "got 0.5 and then 0.5"),
    "too close": ((1.0, 0.5, 0.499995, 0.0), "fall by 1e-05 or more, got 0.5 and then 0.499995"),
    "not a number": ((1.0, math.nan, 0.0), "nan"),
}


@pytest.mark.parametrize("case", NO_GRID)
def test_no_grid(case: str) -> None:
    grid, says = NO_GRID[case]
    with pytest.raises(ValueError, match=says):
        check_grid(grid)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_domain_knows_its_jumps_among_thousands(kind: str) -> None:
    """As they travel in float32; no other pair of nodes, and nothing between nodes."""
    grid = MAKERS[kind](1024)
    domain = TimeDomain("grid", grid)
    travelled = torch.tensor(grid).tolist()
    for t, r in pairwise(travelled):
        domain.check(t, r)
    for i in range(0, 1022, 7):
        for t, r in ((travelled[i], travelled[i + 2]), ((grid[i] + grid[i + 1]) / 2, grid[i + 1])):
            with pytest.raises(ValueError, match="consecutive nodes"):
                domain.check(t, r)
