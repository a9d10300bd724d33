"""All metrics of one set of samples: values, what they are conditional on, and differences on shared seeds."""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import pytest
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation import reference as references
from fewstep.evaluation.extractor import Everything
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.metrics import Labels, compare, differences, outcome
from fewstep.evaluation.reference import ReferenceFeatures, reference_features, tiled_everything
from fewstep.keys import Key

CPU = torch.device("cpu")


def cloud(purpose: str, count: int, shift: float = 0.0) -> Tensor:
    return Key(0).normal(purpose, torch.arange(count), (3,)) + shift


def reference_of(x: Tensor, label: Tensor | None = None, classes: int = 0) -> ReferenceFeatures:
    return reference_features(build_extractor("identity"), Dataset("cloud", x, label, classes, kind="points"), CPU)


def seen(x: Tensor) -> Everything:
    return Everything(x, None, None)


def test_values_are_those_without_intervals() -> None:
    reference, x = reference_of(cloud("data", 500)), cloud("gen", 400, 0.3)
    found = outcome(reference, seen(x)).metrics
    for name, value in compare(reference, x).items():
        assert found[name].value == pytest.approx(value, rel=1e-12), name
    assert found["fd_debiased_identity"].value < found["fd_identity"].value
    for name in ("precision", "recall", "coverage", "authentic"):
        measured = found[f"{name}_identity"]
        assert measured.low is not None
        assert measured.high is not None
        assert 0 <= measured.low < measured.value < measured.high <= 1
    assert "authentic_identity" not in outcome(reference, seen(x), leading=False).metrics


def test_shares_have_the_binomial_error() -> None:
    """``sqrt(p (1 - p) / (M - 1))``, given the manifold."""
    found = outcome(reference_of(cloud("data", 500)), seen(cloud("gen", 400, 0.5))).metrics["precision_identity"]
    p = found.value
    assert found.high is not None
    reach = NormalDist().inv_cdf(0.975) * (p * (1 - p) / 399) ** 0.5
    assert found.high - p == pytest.approx(min(reach, 1 - p), rel=1e-9)


def test_few_samples_have_no_debiased_value_and_no_interval() -> None:
    reference = reference_of(cloud("data", 500))
    found = outcome(reference, seen(cloud("gen", 7))).metrics  # halves of three in three dimensions
    assert "fd_debiased_identity" not in found
    assert found["fd_identity"].low is None
    assert "fd_debiased_identity" in outcome(reference, seen(cloud("gen", 8))).metrics


def test_a_difference_on_shared_seeds_is_known_better_than_either() -> None:
    """Two models that shift the same noise by 0.4 and 0.5: the true distances differ by ``3 (0.25 - 0.16)``, of which
    what the noise adds cancels."""
    reference = reference_of(cloud("data", 2000))
    near, far = (outcome(reference, seen(cloud("gen", 1000, shift))) for shift in (0.4, 0.5))
    apart = differences(far.metrics, far.influences, near.metrics, near.influences)
    fd = apart["fd_debiased_identity"]
    assert fd.low is not None
    assert fd.high is not None
    mean = (cloud("gen", 1000).double().mean(0) - reference.moments.mean).sum()
    assert fd.value == pytest.approx(float(3 * (0.25 - 0.16) + 2 * 0.1 * mean), rel=1e-3)  # given the reference
    assert fd.low < fd.value < fd.high
    single = far.metrics["fd_debiased_identity"]
    assert single.low is not None
    assert single.high is not None
    assert fd.high - fd.low < 0.5 * (single.high - single.low)
    assert "fd_identity" not in apart
    same = differences(far.metrics, far.influences, far.metrics, far.influences)
    assert all(measured.value == 0 and measured.low is None for measured in same.values())
    assert set(apart) == set(far.influences)


def test_each_class_has_its_own() -> None:
    """Class 1 of the reference is far from all samples: its recall is 0 and nobody else's, and samples said to be of it
    are as precise as the others, which lie in class 0's manifold."""
    x = cloud("data", 400)
    ref_label = torch.arange(400) % 2
    x[ref_label == 1] += 50
    gen = cloud("gen", 300)
    labels = Labels(torch.arange(300) % 2, ref_label, 2)
    found = outcome(reference_of(x, ref_label, 2), seen(gen), labels=labels)
    recall = found.per_class["recall_identity"]
    assert recall[1] == 0
    assert recall[0] > 0.5
    assert sum(recall) / 2 == pytest.approx(found.metrics["recall_identity"].value)
    distance = found.per_class["fd_identity"]
    ours = [frechet_distance(moments(x[ref_label == k]), moments(gen[labels.gen_M == k])) for k in range(2)]
    assert distance == pytest.approx(ours)


def test_a_large_reference_has_the_moments_of_all_and_neighbours_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cloud("data", 1000)
    whole = reference_of(x)
    monkeypatch.setattr(references, "REFERENCE_FEATURES", 250)
    monkeypatch.setattr(references, "_BLOCK", 300)
    found = reference_of(x, torch.arange(1000), 1000)
    torch.testing.assert_close(found.moments.cov, whole.moments.cov)
    assert found.moments.n == 1000
    assert found.features is not None
    assert torch.equal(found.features, x[::4])  # evenly spaced
    assert found.label is not None
    assert torch.equal(found.label, torch.arange(0, 1000, 4))


@dataclass(frozen=True)
class Mapped:
    """Keeps the first two values as features, and all as a map with class logits."""

    name: str = "mapped"
    dim: int | None = 2
    digest: str = "m"
    takes: Literal["uint8", "float"] = "float"

    def __call__(self, images: Tensor) -> Tensor:
        return images[:, :2]

    def spatial(self, images: Tensor) -> Tensor:
        return images

    def everything(self, images: Tensor) -> Everything:
        return Everything(images[:, :2], 3 * images, images)


def test_one_pass_gives_scores_and_the_spatial_distance() -> None:
    x, y = cloud("data", 300), cloud("gen", 200, 0.2)
    extractor = Mapped()
    reference = reference_features(extractor, Dataset("cloud", x, None, 0, kind="points"), CPU)
    found = outcome(reference, tiled_everything(extractor, y)).metrics
    assert found["sfid_mapped"].value == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-9)
    assert found["fd_mapped"].value == pytest.approx(frechet_distance(moments(x[:, :2]), moments(y[:, :2])), rel=1e-9)
    assert 1 < found["is_mapped"].value < 3


def test_components_are_those_of_the_reference() -> None:
    images = torch.randint(0, 256, (100, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset("noise", images, None, 0, kind="image")
    found = reference_features(build_extractor("pca"), data, CPU)
    assert found.extractor.name == "pca"
    assert found.features is not None
    covariance = torch.cov(found.features.double().T)
    off = covariance - covariance.diagonal().diag()
    assert float(off.abs().max()) < 1e-4 * float(covariance.diagonal().max())  # uncorrelated, on the reference


def test_halves_are_of_balanced_classes() -> None:
    """Row ``i`` is of class ``i mod 4``, and classes lie far apart: quarters by ``i mod 4`` would be of one class each,
    and halves of two, whose distances make the debiased value absurd."""
    place = torch.arange(800) % 4
    far = 100.0 * torch.nn.functional.one_hot(place, 4)[:, :3].float()
    reference = reference_of(cloud("data", 800) + far)
    labels = Labels(place, None, 4)
    found = outcome(reference, seen(cloud("gen", 800) + far), labels=labels).metrics
    plain, debiased = (found[f"{kind}_identity"].value for kind in ("fd", "fd_debiased"))
    assert abs(debiased - plain) < 0.1
    blind = outcome(reference, seen(cloud("gen", 800) + far)).metrics["fd_debiased_identity"].value
    assert abs(blind - plain) > 100  # the control
