"""Feature extractors: their values, their names, independence of the batch, and the digits classifier's promise."""

import itertools

import pytest
import torch
from safetensors import safe_open

from fewstep.errors import UsageError
from fewstep.evaluation.digits_classifier import WEIGHTS
from fewstep.evaluation.features import (
    EXTRACTORS,
    Classifier,
    FeatureExtractor,
    build_extractor,
    class_accuracy,
    extract,
    metric_name,
)
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.quantise import to_uint8

DIGITS_FILE = WEIGHTS.parents[1] / "data" / "digits.safetensors"


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The shipped digits in [-1, 1], ``[1797, 1, 8, 8]``, and their labels."""
    with safe_open(DIGITS_FILE, framework="pt") as file:
        return file.get_tensor("images").float()[:, None] / 8 - 1, file.get_tensor("labels").long()


def grey_levels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# --- every extractor


@pytest.mark.parametrize("name", ["pixels", "identity", "digits"])
def test_protocol_and_batch_invariance(name):
    extractor = build_extractor(name)
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.name == name
    images = grey_levels(37, 1, 8, 8)
    images = images.float() / 100 if extractor.takes == "float" else images
    whole = extract(extractor, images, batch_size=64)
    assert whole.shape == (37, extractor.dim or 64)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    for batch_size in (1, 8):  # sums may run in another order, which moves the last bits
        torch.testing.assert_close(extract(extractor, images, batch_size), whole, rtol=1e-5, atol=1e-5)
    shuffled = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(extract(extractor, images[shuffled]), whole[shuffled], rtol=1e-5, atol=1e-5)


def test_digests_tell_extractors_apart_and_repeat():
    first = [build_extractor(name).digest for name in ("pixels", "identity", "digits")]
    assert len(set(first)) == 3
    assert first == [build_extractor(name).digest for name in ("pixels", "identity", "digits")]


def test_unknown_name_suggests():
    with pytest.raises(UsageError, match="'pixels'"):
        build_extractor("pixel")
    with pytest.raises(UsageError, match="inception"):
        build_extractor("zzz")


@pytest.mark.parametrize("name", ["pixels", "digits"])
def test_unquantised_images_are_refused(name):
    with pytest.raises(ValueError, match="to_uint8"):
        build_extractor(name)(torch.zeros(2, 1, 8, 8))


def test_nothing_to_extract():
    with pytest.raises(ValueError, match="0 images"):
        extract(build_extractor("pixels"), grey_levels(0, 1, 8, 8))


# --- pixels and identity


def test_pixels_values():
    """u / 127.5 - 1, channels first, row by row."""
    images = torch.tensor([[[[0, 51], [255, 102]], [[204, 0], [0, 0]]]], dtype=torch.uint8)
    features = build_extractor("pixels")(images)
    torch.testing.assert_close(features, torch.tensor([[-1.0, -0.6, 1.0, -0.2, 0.6, -1.0, -1.0, -1.0]]))


def test_identity_passes_floats_through():
    samples = torch.tensor([[0.25, -7.0], [1e-8, 3.0]])
    extractor = build_extractor("identity")
    assert torch.equal(extractor(samples), samples)
    assert extractor(samples.reshape(2, 2, 1).double()).shape == (2, 2)
    with pytest.raises(ValueError, match="floating"):
        extractor(samples.to(torch.uint8))


# --- digits


def test_digits_accuracy_is_what_the_file_states(digits):
    """Every fifth image was held out; the network gets at least 98 % of them right."""
    x, labels = digits
    extractor = build_extractor("digits")
    assert isinstance(extractor, Classifier)
    features = extract(extractor, to_uint8(x[::5]))
    reached = class_accuracy(extractor.logits(features), labels[::5])
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert reached >= 0.98
    assert reached == pytest.approx(float(metadata["held_out_accuracy"]), abs=0.003)  # one image
    assert metadata["licence"]
    assert WEIGHTS.stat().st_size < 500_000


def test_class_accuracy_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert class_accuracy(logits, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one label"):
        class_accuracy(logits, torch.tensor([1]))


def test_digits_features_grade_imperfection(digits):
    """Noise of growing strength moves the features further and further away, from well below the sampling floor on."""
    x, _ = digits
    extractor = build_extractor("digits")
    reference = moments(extract(extractor, to_uint8(x)))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(reference, moments(extract(extractor, to_uint8((x + level * noise).clamp(-1, 1)))))
        for level in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    assert distances[0] < 1e-9
    assert all(2 * nearer < further for nearer, further in itertools.pairwise(distances))


def test_pixel_distance_of_the_digits_is_exact_despite_constant_pixels(digits):
    """Three border pixels never vary, so the reference is singular. Uniformly darker digits have a closed form:
    y = a x + b gives (1 - a)^2 tr S + |(1 - a) m - b|^2."""
    x, _ = digits
    features = extract(build_extractor("pixels"), to_uint8(x)).double()
    reference = moments(features)
    assert reference.factor.shape == (64, 61)
    expected = 0.04 * reference.cov.trace() + (0.2 * reference.mean + 0.1).square().sum()
    assert frechet_distance(reference, moments(0.8 * features - 0.1)) == pytest.approx(float(expected), rel=1e-11)


def test_digits_refuse_other_shapes():
    with pytest.raises(UsageError, match="3x32x32"):
        build_extractor("digits")(grey_levels(2, 3, 32, 32))


# --- names and precision


@pytest.mark.parametrize(
    ("kind", "extractor", "name"),
    [
        ("fd", "inception", "fid"),
        ("kd", "inception", "kid"),
        ("recall", "inception", "recall"),
        ("fd_debiased", "inception", "fid_debiased"),
        ("is", "inception", "is"),
        ("sfid", "inception", "sfid"),
        ("fd_debiased", "pixels", "fd_debiased_pixels"),
        ("fd", "inception_tensorflow", "fd_inception_tensorflow"),
        ("cmmd", "clip", "cmmd_clip"),
        ("fd", "pixels", "fd_pixels"),
        ("kd", "digits", "kd_digits"),
        ("recall", "pixels", "recall_pixels"),
    ],
)
def test_metric_names(kind, extractor, name):
    assert metric_name(kind, extractor) == name


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_no_score_is_called_fid_by_hand(extractor):
    for kind in ("fid", "kid", "fid_debiased"):
        with pytest.raises(ValueError, match="reserved"):
            metric_name(kind, extractor)
