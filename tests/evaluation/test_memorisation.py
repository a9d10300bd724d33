"""Memorisation: lines counted by hand, a model that copies, one that does not, and distances by brute force."""

import pytest
import torch

from fewstep.evaluation.memorisation import (
    authentic,
    authentic_share,
    memorised_share,
    nearer_to_training,
    nearest,
    nearest_other,
)


def normal(n: int, seed: int, dim: int = 12) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_nearer_to_training_on_a_line():
    """Training at 0 and 10, held out at 4 and 20: 1 and 9 are nearer to training, 3 is not, 2 and 15 are ties."""
    found = nearer_to_training(column(1, 3, 2, 15, 9), column(0, 10), column(4, 20))
    assert found.tolist() == [1, 0, 0.5, 0.5, 1]
    assert memorised_share(column(1, 3, 2, 15, 9), column(0, 10), column(4, 20)) == 3 / 5


def test_authentic_on_a_line():
    """Training at 0, 1, 5: nearest others at 1, 1, 4. Samples: -0.5 lies 0.5 from 0 (copied), -2 lies 2 from it
    (authentic), 2 lies 1 from 1 (not strictly farther than 1), 8 lies 3 from 5 (copied), 9.5 lies 4.5 from it."""
    gen, train = column(-0.5, -2, 2, 8, 9.5), column(0, 1, 5)
    assert authentic(gen, train).tolist() == [False, True, False, False, True]
    assert authentic_share(gen, train) == 2 / 5
    assert authentic_share(gen, train, nearest_other(train)) == 2 / 5


def test_nothing_memorised_is_a_half_within_its_error():
    """Training set and held-out set are exchangeable for a sample of the same distribution."""
    shares = torch.tensor(
        [memorised_share(normal(100, s), normal(80, 1000 + s), normal(80, 2000 + s)) for s in range(40)]
    )
    error = float(shares.std()) / 40**0.5
    assert error < 0.02
    assert abs(float(shares.mean()) - 0.5) < 4 * error


def test_copies_are_found():
    train, held_out = normal(700, 0), normal(700, 1)
    copies = train[::3] + 1e-3 * normal(234, 2)
    assert memorised_share(copies, train, held_out) == 1
    assert authentic_share(copies, train) == 0
    assert authentic_share(normal(300, 3), train) > 0.3


def test_an_exact_copy_is_at_distance_zero_far_from_the_origin():
    """Around 1,000 the expanded square would put a copy 0.1 away, and another row closer than it might seem."""
    train = normal(900, 4) * 0.01 + 1000
    distance, index = nearest(train[[5, 700]], train)
    assert distance.tolist() == [0, 0]
    assert index.tolist() == [5, 700]
    assert nearest_other(torch.cat((train, train[:1])))[[0, 900]].tolist() == [0, 0]


@pytest.mark.parametrize("n", [2, 3, 300, 1500])
def test_nearest_rows_by_brute_force(n):
    x, among = normal(600, 5, dim=4), normal(n, 6, dim=4)
    square = (x.double()[:, None] - among.double()).norm(dim=2)
    distance, index = nearest(x, among)
    torch.testing.assert_close(distance, square.min(1).values, rtol=1e-12, atol=0)
    assert torch.equal(index, square.argmin(1))
    own = (among.double()[:, None] - among.double()).norm(dim=2).fill_diagonal_(torch.inf)
    torch.testing.assert_close(nearest_other(among), own.min(1).values, rtol=1e-12, atol=0)


def test_sets_that_cannot_be_compared():
    with pytest.raises(ValueError, match="8 training rows, 9 held out"):
        memorised_share(normal(5, 0), normal(8, 1), normal(9, 2))
    with pytest.raises(ValueError, match="one distance per training row"):
        authentic_share(normal(5, 0), normal(8, 1), torch.zeros(7))
