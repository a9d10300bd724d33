"""Metrics class by class."""

import math
import warnings

import pytest
import torch

from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.per_class import few_samples, frechet_per_class, mean_per_class, moments_per_class


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_distances_within_each_class():
    """Class 2 is shifted by (1, 0, 0); class 1 has as many samples as features, class 3 one, class 4 none."""
    ref, gen = normal(120, 0), normal(104, 1)
    ref_labels = torch.arange(120) % 5
    gen_labels = torch.tensor([0, 2] * 50 + [1, 1, 1, 3])
    gen[gen_labels == 2, 0] += 1
    ours, theirs = moments_per_class(gen, gen_labels, 5), moments_per_class(ref, ref_labels, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = frechet_per_class(theirs, ours)
    assert found[0] == frechet_distance(moments(ref[ref_labels == 0]), moments(gen[gen_labels == 0]))
    assert found[2] > found[0] + 0.3
    assert math.isfinite(found[1])
    assert [math.isnan(value) for value in found] == [False, False, False, True, True]
    assert few_samples(theirs, ours) == [1, 3, 4]


def test_shares_within_each_class():
    indicator = torch.tensor([True, False, True, True, False])
    found = mean_per_class(indicator, torch.tensor([2, 2, 0, 2, 0]), 4)
    assert found[:1] + found[2:3] == pytest.approx([1 / 2, 2 / 3])
    assert math.isnan(found[1])
    assert math.isnan(found[3])


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 4], [0, -1, 2]])
def test_labels_fit_the_rows_and_the_classes(labels):
    with pytest.raises(ValueError, match="label"):
        mean_per_class(torch.zeros(3), torch.tensor(labels), 4)


def test_classes_of_both_sides():
    with pytest.raises(ValueError, match="2 classes against 3"):
        frechet_per_class([None, None], [None, None, None])
