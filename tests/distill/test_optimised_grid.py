"""The grid of least local error: its costs by hand, its dynamic programme against every subset, and what it is not."""

import itertools

import pytest
import torch
from torch import Tensor

from fewstep.data.toys import MIXTURE_1D, MixtureSpec
from fewstep.distill.progressive.optimised_grid import cheapest_path, optimised_nodes, step_costs
from fewstep.grids import check_grid, uniform_nodes
from fewstep.sampling import sample_ode
from fewstep.teachers.analytic import MixtureTeacher

K = 12
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.3, 0.7), means=((-1.5,), (1.0,)), stds=(0.4, 0.25)))
CLASSES = MixtureTeacher.from_spec(MIXTURE_1D)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(costs: Tensor, path: tuple[int, ...]) -> float:
    return sum(float(costs[i, j]) for i, j in itertools.pairwise(path))


def brute_force(costs: Tensor, steps: int) -> float:
    """The least cost over all subsets of inner nodes."""
    return min(total(costs, (0, *inner, K)) for inner in itertools.combinations(range(1, K), steps - 1))


@pytest.mark.parametrize("steps", range(1, K + 1))
def test_the_programme_finds_the_best_of_all_subsets(steps: int) -> None:
    """Of random costs, which no rule of thumb would get right, and of a teacher's."""
    random = normal(K + 1, K + 1, seed=steps).exp().masked_fill(torch.ones(K + 1, K + 1).tril().bool(), torch.inf)
    for costs in (random, step_costs(LINE, normal(40, 1), None, K)):
        path = cheapest_path(costs, steps)
        assert (path[0], path[-1], len(path)) == (0, K, steps + 1)
        assert all(i < j for i, j in itertools.pairwise(path))
        assert total(costs, path) == pytest.approx(brute_force(costs, steps), rel=1e-12)


def test_costs_by_hand() -> None:
    """``mean || x_i + (t_j - t_i) v(x_i, t_i) - x_j ||^2 / D`` along the Euler trajectory, written out."""
    e, label = normal(30, 1), torch.arange(30) % 3
    costs = step_costs(CLASSES, e, label, K)
    x = {0: e}
    for k in range(K):
        x[k + 1] = x[k] - CLASSES(x[k], torch.full((30,), 1 - k / K, dtype=torch.float64), label) / K
    for i, j in ((0, 1), (0, 5), (3, 4), (3, 12), (7, 9)):
        v = CLASSES(x[i], torch.full((30,), 1 - i / K, dtype=torch.float64), label)
        landed = x[i] - (j - i) / K * v
        assert float(costs[i, j]) == pytest.approx(float((landed - x[j]).square().mean()), rel=1e-9, abs=1e-28)
    assert torch.equal(torch.isinf(costs), torch.ones(K + 1, K + 1).tril().bool())


def test_costs_of_parts_add_up() -> None:
    """The mean over samples is that of the means over equal parts: trajectories can be solved a few at a time."""
    e = normal(24, 1)
    whole = step_costs(LINE, e, None, K)
    parts = sum(step_costs(LINE, part, None, K) for part in e.split(8)) / 3
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_the_ends_of_the_range() -> None:
    costs = step_costs(LINE, normal(8, 1), None, K)
    assert optimised_nodes(costs, K) == uniform_nodes(K)
    assert optimised_nodes(costs, 1) == (1.0, 0.0)
    for steps in (0, K + 1):
        with pytest.raises(ValueError, match=f"between 1 and 12 of them, got {steps}"):
            cheapest_path(costs, steps)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_it_is_better_in_what_it_minimises(steps: int) -> None:
    """And in that only: on this mixture the error at the end is that of the uniform grid, within five in a hundred."""
    e = normal(400, 1)
    costs = step_costs(LINE, e, None, 96)
    grid = optimised_nodes(costs, steps)
    check_grid(grid)
    even = tuple(range(0, 97, 96 // steps))
    assert total(costs, cheapest_path(costs, steps)) <= total(costs, even)
    assert set(grid) <= set(uniform_nodes(96))
    fine = sample_ode(LINE, e, torch.tensor(uniform_nodes(96), dtype=torch.float64)).x
    error = {
        name: float((sample_ode(LINE, e, torch.tensor(nodes, dtype=torch.float64)).x - fine).square().mean().sqrt())
        for name, nodes in (("optimised", grid), ("uniform", uniform_nodes(steps)))
    }
    assert error["optimised"] == pytest.approx(error["uniform"], rel=0.05)


class Straight:
    nfe = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return torch.full_like(x, 0.7)


def test_a_straight_flow_needs_no_grid() -> None:
    """Every cost of a velocity that does not change along its path is zero (to rounding)."""
    costs = step_costs(Straight(), normal(8, 2), None, K)
    assert float(costs[~costs.isinf()].max()) < 1e-28
