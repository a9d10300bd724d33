"""The kernel distance: small sets by hand, unbiasedness, a closed form for the population value, an oracle."""

import math

import pytest
import torch

from fewstep.evaluation.kernel import kernel_distance


def test_two_points_each():
    """D = 1, k = (xy + 1)^3. {0, 1}: k(0, 1) = 1. {0, 2}: k(0, 2) = 1. Across: 1, 1, 1, 27, mean 7.5. 1 + 1 - 15."""
    ref, gen = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    assert kernel_distance(ref, gen) == -13


def test_the_inner_product_is_divided_by_the_dimension():
    """D = 2. {(1, 1), (1, -1)}: 0 -> 1. {(2, 0), (2, 2)}: 4/2 -> 27. Across: 2, 4, 2, 0 -> 8, 27, 8, 1, mean 11."""
    ref, gen = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]])
    assert kernel_distance(ref, gen) == 1 + 27 - 22


def test_unequal_sizes():
    """{0, 1, 2}: pairs 1, 1, 27, mean 29/3. {0, 1}: 1. Across: 1, 1, 1, 8, 1, 27, mean 39/6."""
    ref, gen = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    assert kernel_distance(ref, gen) == pytest.approx(29 / 3 + 1 - 13, abs=1e-13)
    assert kernel_distance(gen, ref) == pytest.approx(29 / 3 + 1 - 13, abs=1e-13)


def test_unbiased_around_zero():
    """The same distribution twice: mean 0, so negative about half the time. Keeping i = j would add about 3."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            kernel_distance(torch.randn(6, 2, generator=generator), torch.randn(9, 2, generator=generator))
            for _ in range(2000)
        ]
    )
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * standard_error
    assert standard_error < 0.2
    assert 0.3 < float((values < 0).double().mean()) < 0.7


def test_population_value():
    """x = 0 always, y = m + e, e ~ N(0, 1), D = 1: E k(y, y') - 1 = 3 m^2 + 3 (m^2 + 1)^2 + (m^3 + 3 m)^2.

    (1 + z)^3 with z = y y': E z = m^2, E z^2 = (E y^2)^2, E z^3 = (E y^3)^2; the terms with x are k = 1.
    """
    m, n = 0.5, 8_000
    gen = m + torch.randn(n, 1, generator=torch.Generator().manual_seed(1))
    value = kernel_distance(torch.zeros(10, 1), gen, chunk=2048)
    expected = 3 * m**2 + 3 * (m**2 + 1) ** 2 + (m**3 + 3 * m) ** 2
    # The standard error is 2 std(E[k(y, y') | y]) / sqrt(n) = 0.33; losing one of the three terms costs 0.75 or more.
    assert value == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_chunks_do_not_matter(chunk):
    generator = torch.Generator().manual_seed(2)
    ref, gen = torch.randn(50, 5, generator=generator), torch.randn(33, 5, generator=generator) + 0.2
    assert kernel_distance(ref, gen, chunk=chunk) == pytest.approx(kernel_distance(ref, gen), rel=1e-11)


def test_float32_features_keep_their_digits():
    """Kernels of 8000 that differ by 1e-3 in the end: float32 products alone would be wrong by more than that."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(400, 16, generator=generator) * 0.1 + 4.4
    ref, gen = base[:200], base[200:]
    inner = {
        "xx": ref.double() @ ref.double().T,
        "yy": gen.double() @ gen.double().T,
        "xy": ref.double() @ gen.double().T,
    }
    kernels = {name: (product / 16 + 1) ** 3 for name, product in inner.items()}
    off = ~torch.eye(200, dtype=torch.bool)
    expected = kernels["xx"][off].mean() + kernels["yy"][off].mean() - 2 * kernels["xy"].mean()
    assert kernel_distance(ref, gen) == pytest.approx(float(expected), abs=1e-9)


def test_unusable_features_are_an_error():
    with pytest.raises(ValueError, match="features"):
        kernel_distance(torch.zeros(5, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="features"):
        kernel_distance(torch.zeros(5, 2), torch.zeros(5, 3))
