"""The one quantisation: its grid, its rounding, and what it refuses."""

import pytest
import torch

from fewstep.evaluation.quantise import clamped_fraction, to_uint8


def test_ends_and_middle():
    """127.5 x + 128, cut: -1 -> 0.5 -> 0; 0 -> 128; 1 -> 255.5 -> 255; outside clamps."""
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(x).dtype == torch.uint8


def test_every_grey_level_survives_the_round_trip():
    """u / 127.5 - 1 goes to u + 1/2 before the cut: the middle of the bin, so no rounding error moves it."""
    u = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(u.float() / 127.5 - 1), u)


def test_it_rounds_instead_of_truncating():
    """A value 0.4 of a bin from level 100, to either side, is level 100; 0.6 of a bin is the neighbour."""
    level = 100 / 127.5 - 1
    x = torch.tensor([level - 0.4 / 127.5, level + 0.4 / 127.5, level - 0.6 / 127.5, level + 0.6 / 127.5])
    assert to_uint8(x).tolist() == [100, 100, 99, 101]


def test_half_precision_is_widened_first():
    """bfloat16 spaces numbers near 200 by 1, so 127.5 x + 128 computed in it would lose the fraction that rounds."""
    x = torch.linspace(-1, 1, 511).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.double().float()))


def test_digits_keep_their_seventeen_levels():
    """v / 8 - 1 for v = 0..16 becomes round(255 v / 16), 17 distinct levels."""
    levels = to_uint8(torch.arange(17) / 8 - 1)
    assert levels.tolist() == [round(255 * v / 16) for v in range(17)]


def test_clamped_fraction_counts_what_lies_outside():
    x = torch.tensor([[-1.5, -1.0, 0.0, 1.0], [1.001, 0.5, -0.5, 2.0]])
    assert clamped_fraction(x) == 3 / 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_an_error(bad):
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 0, 0] = x[3, 0, 1, 1] = bad
    with pytest.raises(ValueError, match="2 of 4"):
        to_uint8(x)
    with pytest.raises(ValueError, match="2 of 4"):
        clamped_fraction(x)


def test_a_second_quantisation_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        to_uint8(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
