"""The Inception score in cases that can be said in advance; its formula elsewhere: test_second_implementations.py."""

import math

import pytest
import torch

from fewstep.evaluation import inception_score as module
from fewstep.evaluation.inception_score import inception_score


def certain(labels: list[int], classes: int) -> torch.Tensor:
    """Logits that leave no doubt."""
    return 200.0 * torch.nn.functional.one_hot(torch.tensor(labels), classes).float()


def test_definite_samples_of_every_class_score_their_number():
    """KL of a certain label to uniform over 5 is log 5, in each of 4 parts."""
    mean, sd = inception_score(certain([0, 1, 2, 3, 4] * 8, 7), parts=4)
    assert mean == pytest.approx(5, rel=1e-12)
    assert sd == pytest.approx(0, abs=1e-12)


def test_samples_that_all_look_the_same_score_one():
    assert inception_score(torch.randn(1, 9).expand(60, 9))[0] == pytest.approx(1, rel=1e-12)


def test_two_parts_in_the_order_of_the_samples():
    """Two classes in the first half, one in the second: 2 and 1, so mean 1.5 and sd 1/sqrt(2) (ddof = 1)."""
    mean, sd = inception_score(certain([0, 1, 0, 1, 2, 2, 2, 2], 3), parts=2)
    assert (mean, sd) == pytest.approx((1.5, math.sqrt(0.5)), rel=1e-12)


def test_an_uncertain_sample_by_hand():
    """p = (3/4, 1/4) and (1/4, 3/4): mean (1/2, 1/2), KL = 3/4 log 3/2 + 1/4 log 1/2 for both."""
    logits = torch.log(torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64))
    mean, sd = inception_score(logits, parts=1)
    assert mean == pytest.approx(math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5)), rel=1e-12)
    assert math.isnan(sd)


def test_blocks_and_parts_of_unequal_length(monkeypatch):
    logits = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
    at_once = inception_score(logits)
    monkeypatch.setattr(module, "_BLOCK", 4)
    assert inception_score(logits) == pytest.approx(at_once, rel=1e-13)


@pytest.mark.parametrize("bad", [torch.zeros(9, 5), torch.zeros(10), torch.full((10, 2), math.nan)])
def test_unusable_logits_are_an_error(bad):
    with pytest.raises(ValueError, match="logits"):
        inception_score(bad)
