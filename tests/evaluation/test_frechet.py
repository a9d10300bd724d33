"""The Fréchet distance against values derived on paper, singular cases included, and second implementations."""

import math
import warnings

import pytest
import torch

from fewstep.evaluation import frechet
from fewstep.evaluation.frechet import Moments, congruence, frechet_distance, half_split, half_splits, merge, moments


def gaussian(mean, cov, n=10**6) -> Moments:
    return Moments(torch.tensor(mean, dtype=torch.float64), torch.tensor(cov, dtype=torch.float64), n)


def random_covariance(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64)
    return root @ root.T / dim


def samples(n: int, dim: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Non-negative features with a decaying spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.7
    return torch.randn(n, dim, generator=generator, dtype=torch.float64).relu() * spectrum * scale


def close(value: float, expected: float, tolerance: float = 1e-10) -> None:
    assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)


# --- moments


def test_moments_of_two_points():
    """(1, 2), (3, 6): mean (2, 4), deviations -+(1, 2), so ddof = 1 gives twice the outer product, over one."""
    m = moments(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert m.mean.tolist() == [2.0, 4.0]
    assert m.cov.tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert m.n == 2
    assert m.cov.dtype == torch.float64


def test_a_large_mean_costs_no_digits():
    """Shifting float32 features by 2^12 (exact for multiples of 2^-8) leaves the covariance as it was."""
    x = torch.randint(-512, 512, (5000, 3), generator=torch.Generator().manual_seed(0)) / 256
    torch.testing.assert_close(moments(x + 4096).cov, moments(x).cov, rtol=1e-12, atol=1e-12)


def test_merge_is_the_moments_of_both():
    """Unequal sizes and means, so that a wrong weight shows."""
    x = samples(5000, 4, seed=1) + 3
    parts = [moments(x[:7]), moments(x[7:2500]), moments(x[2500:])]
    merged = merge(merge(parts[0], parts[1]), parts[2])
    whole = moments(x)
    assert merged.n == whole.n
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("bad", [torch.zeros(1, 3), torch.zeros(5), torch.tensor([[0.0], [math.nan]])])
def test_unusable_features_are_an_error(bad):
    with pytest.raises(ValueError, match="features"):
        moments(bad)


def test_factor_reproduces_the_covariance_and_is_computed_once():
    full, singular = (Moments(torch.zeros(6), random_covariance(6, 2, rank), 1000) for rank in (6, 4))
    for m, rank in ((full, 6), (singular, 4)):
        assert m.factor.shape == (6, rank)
        torch.testing.assert_close(m.factor @ m.factor.T, m.cov, rtol=0, atol=1e-14)
        assert m.factor is m.factor


# --- closed forms


def test_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2: N(0, 1) and N(3, 4) are 9 + 1 apart."""
    close(frechet_distance(gaussian([0.0], [[1.0]]), gaussian([3.0], [[4.0]])), 10)


def test_mean_shift_alone():
    """Equal covariances: |m1 - m2|^2 = 9 + 16, whatever the covariance."""
    cov = random_covariance(2, 3).tolist()
    close(frechet_distance(gaussian([0.0, 0.0], cov), gaussian([3.0, -4.0], cov)), 25)


@pytest.mark.parametrize("c", [0.25, 1.0, 9.0])
def test_commuting_covariances(c):
    """S2 = c S1: tr S1 + c tr S1 - 2 sqrt(c) tr S1 = (sqrt c - 1)^2 tr S1."""
    cov = random_covariance(5, 4)
    value = frechet_distance(Moments(torch.zeros(5), cov, 1000), Moments(torch.zeros(5), c * cov, 1000))
    close(value, (math.sqrt(c) - 1) ** 2 * float(cov.trace()))


def test_two_dimensions_without_commuting():
    """(AB)^(1/2) has trace sqrt(tr AB + 2 sqrt(det AB)) in two dimensions (Cayley-Hamilton).

    A = [[2, 1], [1, 2]], B = [[5, 0], [0, 1]]: tr AB = 12, det AB = 15.
    """
    value = frechet_distance(gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]]), gaussian([0.0, 0.0], [[5.0, 0], [0, 1]]))
    close(value, 4 + 6 - 2 * math.sqrt(12 + 2 * math.sqrt(15)))


def test_zero_to_itself_and_symmetric():
    a, b = moments(samples(500, 8, seed=5)), moments(samples(400, 8, seed=6, scale=1.3))
    assert 0 <= frechet_distance(a, a) < 1e-12
    close(frechet_distance(a, b), frechet_distance(b, a))
    assert frechet_distance(a, b) > 0.01


def test_never_negative():
    for seed in range(20):
        m = moments(samples(60, 30, seed=seed))
        assert frechet_distance(m, m) >= 0


# --- singular references


def test_rank_one_reference():
    """A = a a': tr (A B)^(1/2) = sqrt(a' B a). With a = (1, 2, 0), B = diag(4, 3, 7): sqrt(4 + 12) = 4; 5 + 14 - 8."""
    a = [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    b = [[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 7.0]]
    zero = [0.0, 0.0, 0.0]
    close(frechet_distance(gaussian(zero, a), gaussian(zero, b)), 11)
    close(frechet_distance(gaussian(zero, b), gaussian(zero, a)), 11)


def test_a_point_mass():
    """Nothing varies in the reference: |m|^2 + tr S2 = 1 + 5. A collapsed generator is the same, mirrored."""
    point, spread = gaussian([1.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]), gaussian([0.0, 0.0], [[2.0, 0.5], [0.5, 3.0]])
    close(frechet_distance(point, spread), 6)
    close(frechet_distance(spread, point), 6)
    close(frechet_distance(point, point), 0)


def test_constant_features_are_left_out_exactly():
    """A feature constant in the reference that varies by s^2 in the other adds s^2; constant in both adds nothing."""
    x, y = samples(300, 6, seed=7), samples(400, 6, seed=8, scale=1.2)
    core = frechet_distance(moments(x), moments(y))
    noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 0.3
    noise -= noise.mean()
    padded_x = torch.cat((torch.full((300, 1), -1.0), x, torch.zeros(300, 1)), dim=1)
    padded_y = torch.cat((torch.full((400, 1), -1.0), y, noise), dim=1)
    close(frechet_distance(moments(padded_x), moments(padded_y)), core + float(noise.var()))


def test_a_singular_covariance_that_rounding_made_positive():
    """[[1, 1], [1, 1]] with its last bit up has a Cholesky factor, with a pivot of 1e-8 that must not count.

    Rank one against the identity: 2 + 2 - 2 sqrt(2).
    """
    nearly = [[1.0, 1.0], [1.0, 1 + torch.finfo(torch.float64).eps]]
    assert int(torch.linalg.cholesky_ex(torch.tensor(nearly, dtype=torch.float64)).info) == 0
    value = frechet_distance(gaussian([0.0, 0.0], nearly), gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]))
    close(value, 4 - 2 * math.sqrt(2))


def test_dependent_features():
    """Duplicated columns (x, x), (y, y): both covariances are [[S, S], [S, S]], so the distance just doubles."""
    x, y = samples(300, 6, seed=10), samples(400, 6, seed=11, scale=1.4)
    once = frechet_distance(moments(x), moments(y))
    close(frechet_distance(moments(torch.cat((x, x), 1)), moments(torch.cat((y, y), 1))), 2 * once)


# --- any ranks


@pytest.mark.parametrize(("n", "rank_x", "m", "rank_y"), [(200, 60, 300, 60), (200, 30, 300, 60), (200, 60, 300, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_dense_singular_covariances_against_the_nuclear_norm(n, rank_x, m, rank_y, seed):
    """Enough samples, but features that lie in oblique subspaces, so that no entry of a covariance is zero."""
    generator = torch.Generator().manual_seed(seed)
    x = samples(n, rank_x, seed=seed) @ torch.randn(rank_x, 60, generator=generator, dtype=torch.float64)
    y = samples(m, rank_y, seed=seed + 9) @ torch.randn(rank_y, 60, generator=generator, dtype=torch.float64)
    close(frechet_distance(moments(x), moments(y)), distance_by_nuclear_norm(x, y))
    assert moments(x).factor.shape[1] == rank_x


@pytest.mark.parametrize(("n", "m"), [(400, 40), (40, 400), (50, 30), (30, 50), (2, 2)])
@pytest.mark.filterwarnings("ignore:.*mostly bias")
def test_fewer_samples_than_dimensions_against_the_nuclear_norm(n, m):
    x, y = samples(n, 100, seed=12), samples(m, 100, seed=13, scale=1.1) + 0.01
    close(frechet_distance(moments(x), moments(y)), distance_by_nuclear_norm(x, y))


def distance_by_nuclear_norm(x: torch.Tensor, y: torch.Tensor) -> float:
    """tr (S1 S2)^(1/2) is the nuclear norm of Xc Yc' / sqrt((n - 1)(m - 1)): no root of a D x D matrix is involved."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    trace = torch.linalg.svdvals(xc @ yc.T).sum() / math.sqrt(n * m)
    mean_part = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean_part + xc.square().sum() / n + yc.square().sum() / m - 2 * trace)


def test_few_samples_warn():
    many, few = moments(samples(50, 10, seed=14)), moments(samples(10, 10, seed=15))
    for pair in ((many, few), (few, many)):
        with pytest.warns(UserWarning, match="10 samples of 10 features"):
            frechet_distance(*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(many, moments(samples(11, 10, seed=15)))


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match="3 and 2"):
        frechet_distance(moments(samples(9, 3, seed=0)), moments(samples(9, 2, seed=0)))


# --- how it is computed


@pytest.mark.parametrize("n", [2, 3, 40, 100])
def test_few_rows_are_a_factor_of_their_covariance(n):
    """Up to as many samples as features the rows are kept; less their mean they span n - 1 dimensions."""
    m = moments(samples(n, 100, seed=20))
    assert m.rows is not None
    assert m.factor.shape == (100, n - 1)
    torch.testing.assert_close(m.factor @ m.factor.T, m.cov, rtol=1e-12, atol=1e-14)


def test_many_rows_are_not_kept():
    assert moments(samples(101, 100, seed=20)).rows is None


@pytest.mark.parametrize(("n", "m"), [(10, 12), (60, 50)])
def test_merged_rows_are_the_rows_of_both(n, m):
    """10 + 12 of 100 features are still few; 60 + 50 are not."""
    x = samples(n + m, 100, seed=21) + 2
    merged, whole = merge(moments(x[:n]), moments(x[n:])), moments(x)
    assert (merged.rows is None) == (whole.rows is None) == (n + m > 100)
    if whole.rows is not None:
        torch.testing.assert_close(merged.rows, whole.rows, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dim", "rank"), [(5, 5), (20, 20), (20, 7), (33, 33)])
def test_congruence_in_tiles(monkeypatch, dim, rank):
    """Of a triangular factor only what is not zero is multiplied, a tile at a time."""
    monkeypatch.setattr(frechet, "_TILE", 8)
    cov = random_covariance(dim, 22)
    factor = torch.linalg.cholesky(random_covariance(dim, 23)) if rank == dim else random_covariance(dim, 24)[:, :rank]
    found = congruence(factor, cov)
    torch.testing.assert_close(found, factor.T @ cov @ factor, rtol=1e-12, atol=1e-13)
    assert torch.equal(found, found.T)


def test_ill_conditioned_covariances_keep_their_digits():
    """Variances from 1 to 1e-12, rotated: eigenvalues of the product span more digits than a float64 has."""
    generator = torch.Generator().manual_seed(25)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -12, 40, dtype=torch.float64)
    for c in (1.0, 1.21):
        a = Moments(torch.zeros(40), basis * spectrum @ basis.T, 1000)
        b = Moments(torch.zeros(40), basis * (c * spectrum) @ basis.T, 1000)
        close(frechet_distance(a, b), (math.sqrt(c) - 1) ** 2 * float(spectrum.sum()), 1e-9)


# --- bias


def quarters(x: torch.Tensor) -> list[Moments]:
    return [moments(x[part::4]) for part in range(4)]


def test_half_split_is_twice_the_whole_less_the_mean_of_six_halves():
    x, ref = samples(800, 6, seed=26, scale=1.3), moments(samples(900, 6, seed=27))
    parts = [x[part::4] for part in range(4)]
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
    halves = [frechet_distance(ref, moments(torch.cat((parts[i], parts[j])))) for i, j in pairs]
    close(half_split(quarters(x), ref), 2 * frechet_distance(ref, moments(x)) - sum(halves) / 6)


def test_half_split_of_unequal_parts_removes_a_bias_in_one_over_n():
    """Means alone differ and by design: distances of 2 + c / n for every part and every union of parts.

    One feature, covariance zero on the reference's side: (m1 - m2)^2 + s2, with s2 = 2 + c / n by construction.
    """
    sizes = (3, 9, 5, 7)
    ref = gaussian([0.0], [[0.0]])
    rows = torch.randn(24, 1, generator=torch.Generator().manual_seed(28), dtype=torch.float64)
    parts = [moments(part) for part in rows.split(sizes)]
    unions = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
    whole = frechet_distance(ref, moments(rows))
    halves = [frechet_distance(ref, merge(parts[i], parts[j])) for i, j in unions]
    weight = sum(24 / (sizes[i] + sizes[j]) for i, j in unions) / 6 - 1
    close(half_split(parts, ref), whole - (sum(halves) / 6 - whole) / weight)


def test_half_split_may_be_negative_and_has_no_large_bias():
    """From one distribution: the plain distance lies above 0 by c / n, the half-split around 0."""
    ref = Moments(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), 10**6)
    generator = torch.Generator().manual_seed(29)
    draws = [torch.randn(200, 8, generator=generator, dtype=torch.float64) for _ in range(150)]
    plain = torch.tensor([frechet_distance(ref, moments(x)) for x in draws])
    split = torch.tensor([half_split(quarters(x), ref) for x in draws])
    error = float(split.std()) / math.sqrt(len(split))
    assert float(plain.mean()) > 20 * error
    assert abs(float(split.mean())) < 4 * error
    assert float(split.min()) < 0


def test_four_parts():
    with pytest.raises(ValueError, match="four disjoint parts, got 3"):
        half_split(quarters(samples(100, 3, seed=30))[:3], moments(samples(100, 3, seed=31)))


# --- second implementations: others are in test_second_implementations.py


def test_against_scipy_sqrtm():
    try:
        from scipy.linalg import sqrtm
    except Exception as reason:
        pytest.skip(f"scipy does not import: {reason}")
    a, b = moments(samples(500, 32, seed=16)), moments(samples(400, 32, seed=17, scale=1.2))
    trace = sqrtm((a.cov @ b.cov).numpy()).real.trace()
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * trace
    close(frechet_distance(a, b), expected, 1e-9)


@pytest.mark.parametrize("dim", [3, 8, 11])
def test_half_of_a_scatter_matrix_is_enough(monkeypatch, dim):
    x = samples(60, dim, seed=70)
    whole = moments(x)
    monkeypatch.setattr("fewstep.evaluation.frechet._HALF_FROM", 4)
    found = moments(x)
    assert torch.equal(found.cov, found.cov.T)
    close(found.cov, whole.cov)
    close(found.cov, torch.cov(x.double().T))


def test_halves_share_their_products_with_the_whole():
    """What the merged quarters have under the reference's factor is what the whole sample has."""
    x, ref = samples(203, 5, seed=71), moments(samples(100, 5, seed=72))
    found = half_splits(quarters(x), ref)
    assert found.gram is not None
    close(found.gram, congruence(ref.factor, moments(x).cov))
    close(found.plain, frechet_distance(ref, moments(x)))
    assert found.value == half_split(quarters(x), ref)
    flat = moments(samples(100, 5, seed=73) * torch.tensor([1.0, 1, 1, 1, 0]))  # a singular reference has none
    assert half_splits(quarters(x), flat).gram is None
