"""CMMD against its definition written out, and two sets whose value is known."""

import math

import pytest
import torch

from fewstep.evaluation.cmmd import cmmd


def embeddings(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_against_the_definition(chunk):
    ref, gen = embeddings(40, 0), embeddings(33, 1, 0.5)
    x, y = (each.double() / each.double().norm(dim=1, keepdim=True) for each in (ref, gen))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (-(a[:, None] - b).square().sum(2) / (2 * 10**2)).exp().mean()

    expected = 1000 * float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 0.5
    assert cmmd(ref, gen, chunk=chunk) == pytest.approx(expected, rel=1e-10)


def test_opposite_points():
    """Everything at e and everything at -e: k = 1, 1 and exp(-4 / 200) across."""
    e = torch.tensor([[3.0, 0.0]]).expand(5, 2)
    assert cmmd(e, -e) == pytest.approx(2000 * (1 - math.exp(-0.02)), rel=1e-12)


def test_equal_sets_are_at_zero_and_lengths_do_not_count():
    ref = embeddings(50, 2)
    assert cmmd(ref, ref.flip(0)) == pytest.approx(0, abs=1e-10)
    assert cmmd(ref, 7 * ref) == pytest.approx(0, abs=1e-3)
    assert cmmd(ref, 2 * embeddings(50, 3)) == pytest.approx(cmmd(ref, embeddings(50, 3)), rel=1e-12)


def test_the_diagonal_is_included():
    """Two samples of one distribution: the biased estimate is above 0 on average, by what its diagonal adds."""
    values = [cmmd(embeddings(20, seed), embeddings(20, 1000 + seed)) for seed in range(20)]
    assert min(values) > 0


def test_an_embedding_without_a_direction():
    with pytest.raises(ValueError, match="length 0"):
        cmmd(torch.zeros(3, 4), embeddings(3, 0)[:, :4])
