"""Precision, recall, density, coverage: clouds on a line counted by hand, exact expectations, an oracle."""

import math

import pytest
import torch

from fewstep.evaluation.neighbours import manifold_indicators, manifold_metrics, radii, smallest

REF = torch.tensor([[0.0], [1.0], [3.0], [7.0], [10.0]])
GEN = torch.tensor([[-5.0], [2.0], [5.0], [6.0]])


def gaussian(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_radii_on_a_line():
    """0, 1, 3, 7, 10: nearest others at 1, 1, 2, 3, 3; second nearest at 3, 2, 3, 4, 7."""
    assert radii(REF, 2).tolist() == [[1, 3], [1, 2], [2, 3], [3, 4], [3, 7]]


def test_a_copy_is_a_neighbour_at_distance_zero():
    """A row is told from its copy by index, not by distance: 0, 0, 1 have nearest others at 0, 0, 1."""
    assert radii(torch.tensor([[0.0], [0.0], [1.0]]), 1).flatten().tolist() == [0, 0, 1]


def test_metrics_on_a_line_k_one():
    """Reference balls [-1, 1], [0, 2], [1, 5], [4, 10], [7, 13]; generated radii 7, 3, 1, 1.

    Precision: -5 lies in none; 2, 5, 6 lie in some: 3/4. Density: -5 in 0; 2 in [0, 2] (tie) and [1, 5]; 5 in [1, 5]
    (tie) and [4, 10]; 6 in [4, 10]: 5 / (1 * 4). Coverage: the balls around 1 (tie), 3, 7 hold a sample: 3/5.
    Recall: generated balls [-12, 2], [-1, 5], [4, 6], [5, 7] hold 0, 1, 3 and 7 (tie), not 10: 4/5.
    """
    m = manifold_metrics(REF, GEN, k_pr=1, k_dc=1)
    assert (m.precision, m.density, m.coverage) == (3 / 4, 5 / 4, 3 / 5)
    assert m.recall == pytest.approx(4 / 5)


def test_metrics_on_a_line_k_two():
    """Balls of density and coverage with k = 2: [-3, 3], [-1, 3], [0, 6], [3, 11], [3, 17].

    2 lies in the first three, 5 in the last three, 6 in the last three (one tie): 9 / (2 * 4); all five are covered.
    Precision and recall keep k = 1.
    """
    m = manifold_metrics(REF, GEN, k_pr=1, k_dc=2)
    assert (m.precision, m.density, m.coverage) == (3 / 4, 9 / 8, 1.0)
    assert m.recall == pytest.approx(4 / 5)


def test_indicators_on_a_line():
    """Row by row what the test above counts, in the order of the rows."""
    found = manifold_indicators(REF, GEN, k_pr=1, k_dc=1)
    assert found.precise_M.tolist() == [False, True, True, True]
    assert found.inside_M.tolist() == [0, 2, 2, 1]
    assert found.recalled_N.tolist() == [True, True, True, True, False]
    assert found.covered_N.tolist() == [False, True, True, True, False]
    assert found.summary() == manifold_metrics(REF, GEN, k_pr=1, k_dc=1)


def test_the_roles_of_the_sets_differ():
    """Swapped: recall counts REF inside GEN's balls; with GEN as reference that is precision, 4/5 of five rows."""
    m = manifold_metrics(GEN, REF, k_pr=1, k_dc=1)
    assert m.precision == pytest.approx(4 / 5)
    assert m.recall == 3 / 4


def test_exact_copies():
    """Samples that are the reference: every ball holds its centre, its k neighbours (closed balls) and no other row."""
    ref = gaussian(100, 1, seed=0).mul(64).round().unique()[:, None]  # distinct integers
    m = manifold_metrics(ref, ref.clone(), k_pr=3, k_dc=3)
    assert (m.precision, m.recall, m.coverage) == (1, 1, 1)
    counts = ((ref - ref.T).abs() <= radii(ref, 3)[:, -1:]).sum()
    assert m.density == float(counts) / (3 * len(ref))
    assert m.density >= 4 / 3


def test_collapsed_generator():
    """All samples next to one reference row: inside its ball, so precision 1; their balls reach that row at most."""
    ref = gaussian(500, 8, seed=1)
    gen = ref[:1] + 1e-3 * gaussian(300, 8, seed=2)
    m = manifold_metrics(ref, gen)
    assert m.precision == 1
    assert m.recall <= 1 / 500
    assert m.coverage < 0.1


def test_a_generator_far_away_scores_nothing():
    m = manifold_metrics(gaussian(200, 4, seed=3), gaussian(200, 4, seed=4) + 100)
    assert (m.precision, m.recall, m.density, m.coverage) == (0, 0, 0, 0)


@pytest.mark.parametrize(("n", "m", "k"), [(20, 30, 3), (25, 15, 5)])
def test_expectations_for_one_distribution(n, m, k):
    """E[density] = 1: a sample is among the k nearest of n exchangeable points with probability k/n, times n/k.

    E[coverage] = 1 - P(the k nearest of the other n - 1 + m points are all reference rows)
    = 1 - prod_{i=1..k} (n - i)/(n + m - i).
    """
    repeats = 600
    density, coverage = torch.zeros(repeats), torch.zeros(repeats)
    for seed in range(repeats):
        both = gaussian(n + m, 2, seed)
        result = manifold_metrics(both[:n], both[n:], k_dc=k)
        density[seed], coverage[seed] = result.density, result.coverage
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    for values, truth in ((density, 1.0), (coverage, expected)):
        error = float(values.std()) / math.sqrt(repeats)
        assert abs(float(values.mean()) - truth) < 4 * error
        assert error < 0.02


@pytest.mark.parametrize("chunk", [1, 77, 5000])
def test_chunks_do_not_matter(chunk):
    """On integer features every squared distance is exact, so the counts must agree to the last one."""
    ref, gen = gaussian(300, 3, 5).mul(4).round(), gaussian(280, 3, 6).mul(4).round()
    assert manifold_metrics(ref, gen, chunk=chunk) == manifold_metrics(ref, gen)
    assert torch.equal(radii(ref, 5, chunk=chunk), radii(ref, 5))


def test_cached_radii_change_nothing_and_wrong_ones_are_refused():
    ref, gen = gaussian(300, 8, 7), gaussian(200, 8, 8)
    assert manifold_metrics(ref, gen, ref_radii=radii(ref, 7)) == manifold_metrics(ref, gen)
    with pytest.raises(ValueError, match="ref_radii"):
        manifold_metrics(ref, gen, ref_radii=radii(ref, 4))
    with pytest.raises(ValueError, match="ref_radii"):
        manifold_metrics(ref, gen, ref_radii=radii(gen, 5))
    assert manifold_metrics(ref, gen, gen_radii=radii(gen, 3)) == manifold_metrics(ref, gen)
    with pytest.raises(ValueError, match=r"gen_radii are \[200, >= 3\]"):
        manifold_metrics(ref, gen, gen_radii=radii(gen, 2))


def test_a_common_offset_changes_nothing():
    """Features around 100 with unit spread: without centring, |a|^2 + |b|^2 - 2 a.b loses every digit of 0.01."""
    x = gaussian(400, 16, 9)
    torch.testing.assert_close(radii(x + 100, 3), radii(x, 3), rtol=1e-4, atol=0)
    copies = torch.cat((x, x)) + 100
    assert float(radii(copies, 1).max()) < 0.02


def test_too_few_rows_are_an_error():
    with pytest.raises(ValueError, match="3-th nearest other of 3 rows"):
        manifold_metrics(gaussian(20, 2, 0), gaussian(3, 2, 1))


@pytest.mark.parametrize("columns", [5, 255, 256, 300, 1000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_smallest_agrees_with_sorting(columns, k):
    """Columns below and above the size where groups begin, with a remainder, with ties and with infinities."""
    values = gaussian(50, columns, seed=columns).mul(20).round()
    values[:, 2] = torch.inf
    found, columns = smallest(values.clone(), k)
    assert torch.equal(found, values.sort(1).values[:, :k])
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(row.unique()) == k for row in columns)


def test_neighbours_in_groups_by_brute_force():
    """A thousand rows take the grouped selection, in several chunks: self must stay excluded in each of them."""
    x = gaussian(1000, 4, seed=10)
    distance = (x.double()[:, None] - x.double()).norm(dim=2)
    expected = distance.sort(1).values[:, 1:4]  # column 0 is the row itself
    torch.testing.assert_close(radii(x, 3, chunk=300).double(), expected, rtol=1e-3, atol=1e-5)
