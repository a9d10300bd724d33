"""Couplings: the optimal pairs by brute force, the entropic plan by another algorithm, and who may be paired at all."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fewstep.data.dataset import Batch
from fewstep.data.toys import two_moons
from fewstep.distill.couplings import (
    Coupling,
    Noise,
    assignment,
    entropic_plan,
    gaussian_noise,
    independent,
    paired_noise,
    sinkhorn,
)
from fewstep.errors import FewstepError
from fewstep.flow import LINEAR
from fewstep.keys import Key
from fewstep.sources import SOURCES, gaussian
from fewstep.teachers.analytic import MixtureTeacher

KEY = Key(3, 5)
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])  # of one group of six
COUPLED = pytest.mark.parametrize("coupling", [assignment(6), sinkhorn(6, 0.1)], ids=["assignment", "sinkhorn"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(coupling: Coupling, x: Tensor, e: Tensor, label: Tensor | None = None, first: int = 0) -> Tensor:
    """Which noise ``[B]`` (its row in ``e``) each sample got."""
    chosen = coupling(x, e, label, KEY, torch.arange(first, first + len(x)))
    same = (chosen.flatten(1)[:, None] == e.flatten(1)[None]).all(dim=-1)
    assert (same.sum(dim=1) == 1).all()
    return same.int().argmax(dim=1)


def costs(x: Tensor, e: Tensor) -> np.ndarray:
    """``||x_i - e_j||^2`` one by one."""
    return np.array([[float((a - b).square().sum()) for b in e] for a in x])


def cheapest(cost: np.ndarray, label: Tensor | None) -> float:
    """The least total over all permutations that stay within classes."""
    allowed = (
        order
        for order in itertools.permutations(range(len(cost)))
        if label is None or all(label[i] == label[j] for i, j in enumerate(order))
    )
    return min(sum(cost[i, j] for i, j in enumerate(order)) for order in allowed)


# --------------------------------------------------------------------------------------------------------- assignment


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2, 2)])
@pytest.mark.parametrize("group", [2, 3, 6])
def test_assignment_is_the_best_of_all_permutations(group: int, shape: tuple[int, ...], labelled: bool) -> None:
    """In each of four groups, by brute force over its (up to 720) permutations. And it is a permutation of the group
    and of each class in it: both marginals are what they were."""
    x, e = normal(4 * group, *shape), normal(4 * group, *shape, seed=1)
    label = LABELS[:group].repeat(4) if labelled else None
    order = pairs(assignment(group), x, e, label)
    for k in range(0, 4 * group, group):
        part = slice(k, k + group)
        here = order[part] - k
        assert sorted(here.tolist()) == list(range(group))
        own = None if label is None else label[part]
        assert own is None or torch.equal(own[here], own)
        cost = costs(x[part], e[part])
        total = sum(cost[i, j] for i, j in enumerate(here.tolist()))
        assert total == pytest.approx(cheapest(cost, own), rel=1e-12)
    if group == 6:  # it does something
        assert not torch.equal(order, torch.arange(24))


def test_assignment_keeps_classes_apart_at_any_price() -> None:
    """Also where the other class's noise is a million times nearer."""
    x = torch.tensor([[0.0], [1e3], [0.1], [1e3 + 1]], dtype=torch.float64)
    e = torch.tensor([[1e3], [0.0], [1e3 + 2], [0.3]], dtype=torch.float64)
    assert pairs(assignment(4), x, e).tolist() == [1, 0, 3, 2]
    assert pairs(assignment(4), x, e, torch.tensor([0, 1, 0, 1])).tolist() == [0, 1, 2, 3]


def test_one_dimension_is_the_monotone_map() -> None:
    """A group of 1,024 on a line: the k-th smallest sample has the k-th smallest noise. No two paths cross then, so the
    velocity at a state is its own path's ``e - x`` and one Euler step from the noise ends at the data, all of them. The
    independent pairs do cross."""
    x = MixtureTeacher(*(torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [[-1.5], [1.0]], [0.4, 0.25])))
    data = x.sample(Key(1), torch.arange(1024)).double()
    e = gaussian(KEY, "noise", torch.arange(1024), (1,)).double()
    paired = assignment(1024)(data, e, None, KEY, torch.arange(1024))
    torch.testing.assert_close(paired[data[:, 0].argsort()], e.sort(dim=0).values, rtol=0, atol=0)

    def crossings(noise: Tensor) -> int:
        """Neighbours by noise that have changed places by some time."""
        order = noise[:, 0].argsort()
        path = [LINEAR.sample(data, noise, torch.full((1024,), t, dtype=torch.float64)).x_t[order] for t in (0.7, 0.2)]
        return sum(int((state[1:] < state[:-1]).sum()) for state in path)

    assert crossings(paired) == 0
    assert crossings(e) > 100
    landed = paired - (paired - data)
    torch.testing.assert_close(landed.sort(dim=0).values, data.sort(dim=0).values, rtol=0, atol=1e-14)
    # The map of the distributions, F_data^-1(Phi(e)), is what it tends to: the quantiles of a pair differ by no more
    # than two empirical distributions of 1,024 draws do, whose 0.1 % point is 1.95 sqrt(2 / 1024).
    weight, mean, std = x.weights, x.means[:, 0], x.stds
    F = (weight * torch.special.ndtr((data - mean) / std)).sum(dim=1)
    assert float((F - torch.special.ndtr(paired[:, 0])).abs().max()) < 1.95 * math.sqrt(2 / 1024)


# ------------------------------------------------------------------------------------------------------ entropic plan


def matrix_scaling(cost: np.ndarray, epsilon: float) -> np.ndarray:
    """Sinkhorn and Knopp as they wrote it: ``diag(u) exp(-C / eps) diag(v)`` with sums one, to rounding."""
    kernel = np.exp(-cost / (epsilon * cost.mean()))
    v = np.ones(len(cost))
    for _ in range(200_000):
        u = 1 / (kernel @ v)
        if np.abs(v * (kernel.T @ u) - 1).max() < 1e-13:
            break
        v = 1 / (kernel.T @ u)
    return u[:, None] * kernel * v


@pytest.mark.parametrize("epsilon", [0.03, 0.1, 1.0])
def test_plan_is_that_of_matrix_scaling(epsilon: float) -> None:
    """Rows sum to one to 1e-12 whatever the tolerance, columns to the tolerance; taken to 1e-11, the plan is the one of
    the classical algorithm on the kernel itself."""
    x, e = normal(3 * 8, 2), normal(3 * 8, 2, seed=1)
    cost = torch.stack([torch.from_numpy(costs(x[k : k + 8], e[k : k + 8])) for k in (0, 8, 16)])
    for tolerance in (1e-3, 1e-11):
        plan = entropic_plan(cost, epsilon, tolerance, 100_000)
        assert plan.dtype == torch.float64
        torch.testing.assert_close(plan.sum(dim=2), torch.ones(3, 8, dtype=torch.float64), rtol=0, atol=1e-12)
        assert float((plan.sum(dim=1) - 1).abs().max()) < tolerance
    for found, one in zip(plan, cost, strict=True):
        np.testing.assert_allclose(found.numpy(), matrix_scaling(one.numpy(), epsilon), rtol=0, atol=1e-9)


@pytest.mark.parametrize("epsilon", [0.3, 0.1, 0.03, 0.01])
def test_plan_of_a_small_epsilon_costs_what_the_assignment_costs(epsilon: float) -> None:
    """The plan minimises ``<P, C> - eps H(P)`` and the assignment is a candidate without entropy, so its cost is above
    the assignment's by at most ``eps H(P)``; below it by no more than its columns, off by 1e-3, can save. At 0.01
    hardly anything but the assignment is left, and is drawn."""
    x, e = normal(6, 2, seed=8), normal(6, 2, seed=9)
    cost = costs(x, e)
    plan = entropic_plan(torch.from_numpy(cost)[None], epsilon, 1e-3, 20_000)[0].numpy()
    entropy = -np.sum(plan * np.log(np.maximum(plan, 1e-300)))
    best, saved = cheapest(cost, None), 6e-3 * cost.max()
    assert best - saved < (plan * cost).sum() <= best + epsilon * cost.mean() * entropy + saved
    if epsilon == 0.01:
        assert (plan * cost).sum() == pytest.approx(best, rel=1e-3)
        order = pairs(assignment(6), x, e)
        assert torch.from_numpy(plan)[torch.arange(6), order].min() > 0.99
        assert torch.equal(pairs(sinkhorn(6, epsilon, max_iterations=20_000), x, e), order)


def test_plan_of_a_large_epsilon_is_the_independent_one() -> None:
    """Every noise of the class alike, to the order of the mean cost over epsilon; none of the others."""
    x, e = normal(6, 2), normal(6, 2, seed=1)
    cost = torch.from_numpy(costs(x, e))[None]
    torch.testing.assert_close(entropic_plan(cost, 1e6, 1e-9, 100), torch.full_like(cost, 1 / 6), rtol=0, atol=1e-5)
    together = LABELS[:, None] == LABELS[None]
    plan = entropic_plan(cost.masked_fill(~together, torch.inf), 1e6, 1e-9, 100)
    torch.testing.assert_close(plan[0], together.double() / 3, rtol=0, atol=1e-5)
    assert (plan[0][~together] == 0).all()


def test_epsilon_is_relative_to_the_mean_cost_of_allowed_pairs() -> None:
    """Data and noise in other units have the same plan; with classes a block's plan is that of matrix scaling with the
    mean over both blocks as the unit."""
    x, e = normal(6, 2), normal(6, 2, seed=1)
    cost = torch.from_numpy(costs(x, e))[None]
    torch.testing.assert_close(
        entropic_plan(100 * cost, 0.3, 1e-9, 10_000), entropic_plan(cost, 0.3, 1e-9, 10_000), rtol=0, atol=1e-12
    )
    together = LABELS[:, None] == LABELS[None]
    plan = entropic_plan(cost.masked_fill(~together, torch.inf), 0.3, 1e-10, 10_000)[0].numpy()
    unit = cost[0][together].mean().item()
    for label in (0, 1):
        rows = np.flatnonzero(LABELS.numpy() == label)
        block = cost[0].numpy()[np.ix_(rows, rows)]
        wanted = matrix_scaling(block, 0.3 * unit / block.mean())
        np.testing.assert_allclose(plan[np.ix_(rows, rows)], wanted, rtol=0, atol=1e-9)


def test_drawn_pairs_follow_the_plan() -> None:
    """4,000 copies of one group of five: the counts of noise j with sample i against ``4000 P_ij``, chi-square below
    its 0.1 % point. It goes beyond it for the plan of an epsilon one tenth larger, which is the control."""
    copies, group, epsilon = 4000, 5, 0.5
    x, e = normal(group, 2, seed=2), normal(group, 2, seed=3)
    order = pairs(sinkhorn(group, epsilon), x, e)
    assert int(order.max()) < group
    chosen = sinkhorn(group, epsilon)(
        x.repeat(copies, 1), e.repeat(copies, 1), None, KEY, torch.arange(copies * group)
    ).reshape(copies, group, 1, 2)
    count = (chosen == e).all(dim=-1).sum(dim=0).numpy()
    assert (count.sum(axis=1) == copies).all()

    def statistic(plan: np.ndarray) -> float:
        assert (copies * plan).min() > 5
        return float(((count - copies * plan) ** 2 / (copies * plan)).sum())

    bound = scipy.stats.chi2.ppf(0.999, group * (group - 1))
    cost = costs(x, e)
    assert statistic(matrix_scaling(cost, epsilon)) < bound
    assert statistic(matrix_scaling(cost, 1.1 * epsilon)) > bound


def test_a_plan_that_does_not_converge() -> None:
    """Says so and what to do, and does not go on with what it has."""
    x, e = normal(8, 2), normal(8, 2, seed=1)
    with pytest.raises(FewstepError, match=r"not converged to 0\.001 in 20 iterations: raise its epsilon"):
        sinkhorn(8, 1e-3, max_iterations=20)(x, e, None, KEY, torch.arange(8))


@COUPLED
def test_a_sample_that_is_no_number_stays_where_it_is(coupling: Coupling) -> None:
    """Its loss is what the trainer finds it by; the groups beside it are paired as ever."""
    x, e = normal(12, 2), normal(12, 2, seed=1)
    wanted = pairs(coupling, x, e)
    x[7, 0] = math.nan
    found = pairs(coupling, x, e)
    assert found[6:].tolist() == list(range(6, 12))
    assert torch.equal(found[:6], wanted[:6])


# ----------------------------------------------------------------------------------------------------- who meets whom


@COUPLED
def test_classes_are_never_mixed(coupling: Coupling) -> None:
    """Over 100 groups; without labels the same samples do get noise of the other class."""
    x, e, label = normal(600, 2), normal(600, 2, seed=1), LABELS.repeat(100)
    assert torch.equal(label[pairs(coupling, x, e, label)], label)
    assert not torch.equal(label[pairs(coupling, x, e)], label)


@COUPLED
def test_groups_do_not_see_each_other(coupling: Coupling) -> None:
    """A batch of two groups is two batches of one, to the bit."""
    x, e, label = normal(12, 2), normal(12, 2, seed=1), LABELS.repeat(2)
    for own in (None, label):
        whole = pairs(coupling, x, e, own)
        assert torch.equal(whole // 6, torch.arange(12) // 6)
        for k in (0, 6):
            part = slice(k, k + 6)
            alone = pairs(coupling, x[part], e[part], None if own is None else own[part], first=k)
            assert torch.equal(alone + k, whole[part])


def test_groups_do_not_wait_for_each_other() -> None:
    """A plan that has converged stays what it is while others of its batch go on: of 1,024 pairs three would change
    when their 16 groups are scaled together until the last one has converged."""
    x, e, index = two_moons(1024, 0).x, gaussian(Key(0), "noise", torch.arange(1024), (2,)), torch.arange(1024)
    whole = sinkhorn(64, 0.05)(x, e, None, Key(1), index)
    for part in index.split(64):
        assert torch.equal(sinkhorn(64, 0.05)(x[part], e[part], None, Key(1), part), whole[part])


@pytest.mark.parametrize("source", SOURCES)
@COUPLED
def test_pairs_do_not_depend_on_microbatches_and_ranks(coupling: Coupling, source: str) -> None:
    """Noise of a batch equals, to the bit, that of its microbatches and of its processes' shares; a noise that belongs
    to a sample goes with its index in the global batch."""
    batch = Batch(normal(24, 1, 2, 2).float(), LABELS.repeat(4), torch.arange(24))
    noise: Noise = paired_noise(SOURCES[source], coupling)
    whole = noise(batch, KEY)
    for parts in (2, 4):
        assert torch.equal(torch.cat([noise(part, KEY) for part in batch.split(parts)]), whole)
    second_rank = Batch(batch.x[12:], batch.label[12:], torch.arange(12, 24))
    assert torch.equal(noise(second_rank, KEY), whole[12:])
    assert not torch.equal(noise(second_rank, Key(3, 6)), whole[12:])
    drawn = SOURCES[source](KEY, "noise", batch.index, (1, 2, 2))
    rows = (whole[:, None] == drawn[None]).flatten(2).all(dim=-1)
    assert (rows.sum(dim=1) >= 1).all()
    assert (rows.int().argmax(dim=1) != torch.arange(24)).any()


@COUPLED
def test_noise_of_a_batch_is_paired_within_its_classes(coupling: Coupling) -> None:
    """A batch's own labels reach the coupling: a noise and its sample are of one class, in every group of six."""
    batch = Batch(normal(60, 2).float(), LABELS.repeat(10), torch.arange(60))
    drawn = gaussian(KEY, "noise", batch.index, (2,))
    of = (paired_noise(gaussian, coupling)(batch, KEY)[:, None] == drawn[None]).all(dim=-1).int().argmax(dim=1)
    assert torch.equal(batch.label[of], batch.label)
    assert not torch.equal(of, torch.arange(60))


def test_independent_noise_is_its_samples_own() -> None:
    """To the bit what the objectives drew before there were couplings: the normal numbers of purpose "noise"."""
    batch = Batch(normal(6, 1, 2, 2).float(), LABELS, torch.arange(100, 106))
    wanted = KEY.normal("noise", batch.index, (1, 2, 2))
    assert torch.equal(gaussian_noise(batch, KEY), wanted)
    assert torch.equal(independent(batch.x, wanted, LABELS, KEY, batch.index), wanted)
    assert torch.equal(
        paired_noise(SOURCES["laplace"], independent)(batch, KEY),
        SOURCES["laplace"](KEY, "noise", batch.index, (1, 2, 2)),
    )
