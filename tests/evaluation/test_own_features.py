"""Extractors that need no pretrained weights: random convolutions, principal components, a classifier of the user's
images, the user's own function."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refuse, succeed
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.data.load import digits
from fewstep.errors import FewstepError, UsageError
from fewstep.evaluation import classifier_training
from fewstep.evaluation.classifier import ClassifierFeatures, ImageClassifier, load_classifier, write_classifier
from fewstep.evaluation.classifier_training import augment, train_classifier
from fewstep.evaluation.extractor import Classifier, FeatureExtractor, Fitted
from fewstep.evaluation.features import (
    build_extractor,
    class_accuracy,
    extract,
    extractor_facts,
    extractor_name,
    fitted,
)
from fewstep.evaluation.frechet import frechet_distance, moments
from fewstep.evaluation.pca import Pca
from fewstep.evaluation.quantise import to_uint8
from fewstep.keys import Key

CPU = torch.device("cpu")


def grey_levels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """The shipped digits as uint8 ``[1797, 1, 8, 8]``."""
    return to_uint8(digits().x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An untrained classifier of 2x9x9 images of 5 classes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    write_classifier(folder, ImageClassifier(2, 5), {"shape": [2, 9, 9], "num_classes": 5})
    return folder


# --- what all of them promise


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("random_conv", (3, 20, 17)), ("random_conv", (1, 8, 8)), ("pca", (2, 9, 9)), ("own", (2, 9, 9))],
)
def test_protocol_and_batch_invariance(kind, shape, folder) -> None:
    images = grey_levels(70, *shape)
    extractor = build_extractor(f"classifier:{folder}" if kind == "own" else kind)
    extractor = fitted(extractor, extract(extractor, images))
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.name == {"own": "classifier"}.get(kind, kind)
    whole = extract(extractor, images, batch_size=64)
    assert whole.shape == (70, extractor.dim)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert bool(torch.isfinite(whole).all())
    for batch_size in (1, 8):
        torch.testing.assert_close(extract(extractor, images[:16], batch_size), whole[:16], rtol=1e-4, atol=1e-4)
    shuffled = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(extract(extractor, images[shuffled]), whole[shuffled], rtol=1e-4, atol=1e-4)
    assert float(whole.std(0).median()) > 1e-3
    with pytest.raises(ValueError, match="to_uint8"):
        extractor(images.float())


def test_digests_tell_them_apart_and_repeat(folder) -> None:
    names = ("random_conv", "pca", f"classifier:{folder}", "pixels")
    first = [build_extractor(name).digest for name in names]
    assert len(set(first)) == 4
    assert first == [build_extractor(name).digest for name in names]


def test_names_of_what_has_an_address(tmp_path) -> None:
    assert extractor_name("classifier:some/folder") == "classifier"
    assert extractor_name("callable:numpy.fft:fft") == "unverified_fft"
    assert extractor_name("pixels") == "pixels"
    for name, says in (
        ("classifier", "classifier:FOLDER"),
        ("callable:thing", "package.module:function"),
        ("pixels:x", "unknown features"),
        (f"classifier:{tmp_path}", "fewstep data classifier"),
    ):
        with pytest.raises(UsageError, match=says):
            build_extractor(name)


# --- random convolutions


def test_random_features_by_hand() -> None:
    """One stage at one pixel: the filter's sum with the border repeated, ReLU; the next stages see means of 2 x 2."""
    extractor = build_extractor("random_conv")
    filters = [
        Key(0, stage).normal("random_conv", torch.arange(width), (inputs, 3, 3)).double() * (2 / (9 * inputs)) ** 0.5
        for stage, (inputs, width) in enumerate([(1, 32), (32, 64), (64, 64)])
    ]
    image = grey_levels(1, 1, 3, 2)
    x = np.asarray(image[0], dtype=np.float64) / 127.5 - 1
    expected = []
    for stage, weight in enumerate(filters):
        if stage > 0:  # 3x2 -> 2x1 -> 1x1
            x = np.stack([x[:, row : row + 2].mean((1, 2)) for row in range(0, x.shape[1], 2)], 1)[:, :, None]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
        height, width = x.shape[1:]
        patches = np.stack([[padded[:, r : r + 3, c : c + 3] for c in range(width)] for r in range(height)])
        x = np.einsum("oikl,rcikl->orc", weight.numpy(), patches).clip(0)
        expected += [x.mean((1, 2)), x.std((1, 2))]
    np.testing.assert_allclose(extractor(image)[0].numpy(), np.concatenate(expected), atol=1e-5)


def test_random_features_grade_imperfection(reference) -> None:
    reference = reference[::4]
    extractor = build_extractor("random_conv")
    base = moments(extract(extractor, reference))
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    levels = [
        to_uint8((reference.float() / 127.5 - 1 + level * noise).clamp(-1, 1)) for level in (0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    distances = [frechet_distance(base, moments(extract(extractor, each))) for each in levels]
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0] > 0


# --- principal components


def test_components_are_those_of_the_covariance(reference) -> None:
    """Coordinates are uncorrelated, centred, of the variances that are the covariance's eigenvalues, largest first."""
    unfitted = build_extractor("pca")
    assert isinstance(unfitted, Fitted)
    assert unfitted.name == "pca_unfitted"
    pixels = extract(unfitted, reference)
    assert torch.equal(pixels, extract(build_extractor("pixels"), reference))
    extractor = fitted(Pca(CPU, components=10), pixels)
    assert not isinstance(extractor, Fitted)
    found = moments(extract(extractor, reference))
    expected = torch.linalg.eigvalsh(moments(pixels).cov).flip(0)[:10]
    assert (extractor.name, extractor.dim) == ("pca", 10)
    torch.testing.assert_close(found.cov, expected.diag(), atol=1e-5, rtol=1e-5)
    assert float(found.mean.abs().max()) < 1e-5
    assert torch.equal(extractor.project(pixels), extractor(reference))
    with pytest.raises(ValueError, match="64 pixel values"):
        extractor(grey_levels(2, 1, 9, 9))


def test_as_many_components_as_the_reference_spans() -> None:
    """64, or the pixels that vary (61 of the digits' 64), or one less than the images; the two routes agree."""
    images = grey_levels(300, 1, 10, 10)
    unfitted = Pca(CPU)
    pixels = extract(unfitted, images)
    assert fitted(unfitted, pixels).dim == 64
    few = pixels[:40]
    assert fitted(unfitted, few).dim == 39
    constant = pixels.clone()
    constant[:, 5:] = 0.5
    assert fitted(unfitted, constant).dim == 5
    assert fitted(unfitted, constant[:40]).dim == 5
    tall, wide = unfitted.fit(constant[:40]), unfitted.fit(torch.cat((constant[:40], constant[:40], constant[:40])))
    torch.testing.assert_close(tall.basis, wide.basis, atol=1e-5, rtol=1e-4)  # by svd and by eigh, signs included
    for wrong in (pixels[:1], torch.full((3, 4), torch.nan), torch.ones(5, 4)):
        with pytest.raises(ValueError, match="principal components"):
            unfitted.fit(wrong)


def test_large_images_are_reduced_by_means_of_blocks() -> None:
    images = grey_levels(2, 3, 64, 96)
    pixels = Pca(CPU)(images)
    assert pixels.shape == (2, 3 * 32 * 32)
    blocks = images.double().reshape(2, 3, 32, 2, 32, 3).mean((3, 5)) / 127.5 - 1
    torch.testing.assert_close(pixels, blocks.float().flatten(1))
    assert Pca(CPU)(grey_levels(2, 1, 33, 4)).shape == (2, 32 * 4)


def test_the_digest_of_components_is_the_references() -> None:
    unfitted = Pca(CPU)
    pixels = extract(unfitted, grey_levels(80, 1, 4, 4))
    first = unfitted.fit(pixels).digest
    assert first == unfitted.fit(pixels.clone()).digest
    assert first != unfitted.fit(pixels[:79]).digest
    assert first != Pca(CPU, components=3).fit(pixels).digest
    assert first != unfitted.digest


# --- the classifier


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """`fewstep data classifier` on the shipped digits, for fewer steps than by default."""
    out = tmp_path_factory.mktemp("trained") / "classifier"
    recipe = "digits-teacher"
    result = succeed("data", "classifier", recipe, "--out", out, "--steps", 80, "--json")
    assert "held-out images right" in result.stderr
    return out, json.loads(result.stdout)


def test_trained_on_the_digits(trained, reference) -> None:
    """What the card states of the held-out fifth is what the extractor gets right of it."""
    out, card = trained
    extractor = build_extractor(f"classifier:{out}")
    assert isinstance(extractor, Classifier)
    assert card["held_out"] == 1797 // 5
    assert card["trained_on"] == 1797 - 1797 // 5
    assert card["accuracy"] > 0.95
    order = Key(0).permutations("held out", 1797, 1, CPU)[0][: 1797 // 5]
    labels = digits().label
    assert extractor_facts(extractor) == {
        **{key: card[key] for key in ("dataset", "trained_on", "held_out", "accuracy")},
        **{"dim": 64, "digest": extractor.digest},
    }
    logits = extractor.logits(extract(extractor, reference[order]))
    assert class_accuracy(logits, labels[order]) == pytest.approx(card["accuracy"], abs=0.003)
    assert {"dataset", "steps", "seed", "digest"} <= set(json.loads((out / "classifier.json").read_text()))
    assert sorted(path.name for path in out.iterdir()) == ["classifier.json", "classifier.safetensors"]


def test_trained_features_grade_imperfection(trained, reference) -> None:
    reference = reference[::4]
    extractor = build_extractor(f"classifier:{trained[0]}")
    base = moments(extract(extractor, reference))
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    images = [to_uint8((reference.float() / 127.5 - 1 + level * noise).clamp(-1, 1)) for level in (0.1, 0.2, 0.4, 0.8)]
    distances = [frechet_distance(base, moments(extract(extractor, each))) for each in images]
    assert distances == sorted(distances)
    assert distances[0] > 0


def small(n: int = 60, *, side: int = 6, classes: int = 3, kind: str = "image") -> Dataset:
    label = torch.arange(n) % classes
    x = torch.randn(n, 2, side, side, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return Dataset("small", x, label, classes, kind=kind)


def train(data: Dataset, out: Path, **changes: object) -> dict:
    settings = {"steps": 2, "batch_size": 4, "seed": 0, "device": CPU} | changes
    return train_classifier(data, out, **settings)


def test_training_is_a_function_of_the_seed(tmp_path) -> None:
    """Whatever the global generator holds, and without moving it."""
    state = torch.random.get_rng_state()
    first = train(small(), tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert train(small(), tmp_path / "b")["digest"] == first["digest"]
    assert train(small(), tmp_path / "c", seed=1)["digest"] != first["digest"]
    a, b = (load_classifier(tmp_path / name, CPU) for name in "ab")
    assert a.digest == b.digest != load_classifier(tmp_path / "c", CPU).digest


def test_what_is_held_out_is_not_trained_on(tmp_path, monkeypatch) -> None:
    """Of 60 images 12 measure; whatever 40 steps draw comes from the other 48, and from all of them."""
    seen: list[set[int]] = []
    plain = Dataset.samples

    def watched(self: Dataset, rows: Tensor) -> Tensor:
        seen.append(set(rows.tolist()))
        return plain(self, rows)

    monkeypatch.setattr(Dataset, "samples", watched)
    card = train(small(), tmp_path / "out", steps=40, batch_size=16)
    *batches, held_out = seen
    drawn = set().union(*batches)
    assert (card["held_out"], len(held_out)) == (12, 12)
    assert drawn == set(range(60)) - held_out


def test_a_classifier_of_other_widths(tmp_path) -> None:
    """Its card says them, and the extractor is the network that was trained: more stages, other features."""
    card = train(small(side=16), tmp_path / "wide", widths=(8, 16, 16, 24), feature_dim=5, precision="bf16")
    assert (card["widths"], card["feature_dim"], card["precision"]) == ([8, 16, 16, 24], 5, "bf16")
    extractor = load_classifier(tmp_path / "wide", CPU)
    assert extractor.dim == 5
    assert len(extractor.network.stages) == 4
    assert extract(extractor, grey_levels(3, 2, 16, 16)).shape == (3, 5)
    # One written before cards said so has the widths of then.
    train(small(), tmp_path / "plain")
    path = tmp_path / "plain" / "classifier.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("widths", "feature_dim")}
    path.write_text(json.dumps(old))
    assert load_classifier(tmp_path / "plain", CPU).dim == 64


def test_half_of_the_images_are_mirrored_where_that_is_asked_for(tmp_path, monkeypatch) -> None:
    """What the network is given is, for about half of the samples, the mirrored image and nothing else."""
    seen: list[Tensor] = []
    plain = ImageClassifier.forward
    monkeypatch.setattr(classifier_training, "augment", lambda x, key: x)
    monkeypatch.setattr(ImageClassifier, "forward", lambda self, x: seen.append(x) or plain(self, x))
    for flip in (False, True):
        train(small(), tmp_path / str(flip), steps=20, batch_size=16, flip=flip)
    batches = len(seen) // 2
    # The last of each measure the accuracy.
    straight, mirrored = (torch.cat(each[:-1]) for each in (seen[:batches], seen[batches:]))
    same = (straight == mirrored).flatten(1).all(dim=1)
    assert torch.equal(straight[~same].flip(-1), mirrored[~same])
    assert 0.4 < float(same.float().mean()) < 0.6
    assert torch.equal(seen[batches - 1], seen[-1])


def test_a_test_set_measures_and_nothing_is_held_out(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    data, test = small(), replace(small(33), name="apart")
    drawn: dict[str, set[int]] = {"small": set(), "apart": set()}
    plain = Dataset.samples

    def watched(self: Dataset, rows: Tensor) -> Tensor:
        drawn[self.name].update(rows.tolist())
        return plain(self, rows)

    monkeypatch.setattr(Dataset, "samples", watched)
    card = train(data, tmp_path / "out", test=test, steps=40, batch_size=16)
    assert (card["trained_on"], card["held_out"], card["tested_on"]) == (60, 33, "apart")
    assert drawn == {"small": set(range(60)), "apart": set(range(33))}
    assert extractor_facts(load_classifier(tmp_path / "out", CPU))["tested_on"] == "apart"
    for other, says in (
        (replace(small(classes=4), name="apart"), "4 classes"),
        (replace(small(side=5), name="apart"), "images of"),
        (replace(test, label=None), "classes"),
    ):
        with pytest.raises(UsageError, match=says):
            train(data, tmp_path / "no", test=other)
    for widths in ((12,), (), (8, 0)):
        with pytest.raises(UsageError, match="multiples of 8"):
            train(data, tmp_path / "no", widths=widths)
    assert not (tmp_path / "no").exists()


def test_the_options_of_a_classifier(tmp_path) -> None:
    words = ("data", "classifier", "digits-teacher", "--steps", 2, "--test", "digits-teacher", "--features", 3)
    result = succeed(*words, "--widths", "8,16", "--flip", "--precision", "bf16", "--out", tmp_path / "out", "--json")
    card = json.loads(result.stdout)
    assert (card["widths"], card["feature_dim"], card["flip"], card["tested_on"]) == ([8, 16], 3, True, "digits")
    assert "of 1797 images of digits right" in result.stderr
    refuse(*words, "--widths", "8,x", "--out", tmp_path / "no", says=("--widths takes numbers",))


def test_large_images_and_single_pixels(tmp_path) -> None:
    for side in (1, 40):
        train(small(side=side), tmp_path / str(side))
        extractor = load_classifier(tmp_path / str(side), CPU)
        assert extract(extractor, grey_levels(2, 2, side, side)).shape == (2, 64)


def test_augmented_images_are_shifted_copies() -> None:
    """Without noise each is one of the shifts by at most an eighth of a side, rows and columns by themselves."""
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clean = augment(x, Key(0))
    seen = set()
    for image, found in zip(x, clean, strict=True):
        padded = torch.nn.functional.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
        apart = {
            (row, column): float((padded[:, row : row + 8, column : column + 8] - found).abs().mean())
            for row in range(3)
            for column in range(3)
        }
        best = min(apart, key=apart.__getitem__)
        assert apart[best] < 0.2
        seen.add(best)
    assert len(seen) == 9
    assert float(clean.abs().max()) <= 1


def test_what_a_classifier_cannot_be_trained_on(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    out = tmp_path / "out"
    for data, says in (
        (small(kind="latents"), "takes images and small has latents"),
        (replace(small(), label=None, num_classes=0), "two classes or more and small has none"),
        (small(classes=1), "small has 1"),
        (small(19), "needs 20 or more"),
    ):
        with pytest.raises(UsageError, match=says):
            train(data, out)
    assert not out.exists()
    train(small(), out)
    with pytest.raises(UsageError, match="--overwrite"):
        train(small(), out)
    train(small(), out, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        train(small(), tmp_path / "other", overwrite=True)
    monkeypatch.setattr(classifier_training, "augment", lambda x, key: x * torch.nan)
    monkeypatch.setattr(classifier_training, "to_uint8", lambda x: x)
    with pytest.raises(FewstepError, match="not finite at step 1"):
        train(small(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_images_of_another_shape_are_refused(folder) -> None:
    extractor = load_classifier(folder, CPU)
    assert isinstance(extractor, ClassifierFeatures)
    with pytest.raises(UsageError, match="images of 2x9x9, got 1x9x9"):
        extractor(grey_levels(1, 1, 9, 9))


def test_damaged_classifiers_are_a_sentence(tmp_path) -> None:
    for name, text in (("format", '{"format": 9}'), ("empty", '{"format": 1}'), ("broken", "{")):
        place = tmp_path / name
        place.mkdir()
        (place / "classifier.json").write_text(text)
        with pytest.raises(UsageError) as caught:
            load_classifier(place, CPU)
        assert str(place) in str(caught.value)
    write_classifier(tmp_path / "other", ImageClassifier(1, 3), {"shape": [2, 9, 9], "num_classes": 3})
    with pytest.raises(UsageError, match="damaged"):
        load_classifier(tmp_path / "other", CPU)


def test_the_command_refuses_in_a_sentence(trained, tmp_path) -> None:
    refuse("data", "classifier", "digits-teacher", "--out", trained[0], says=("--overwrite",))
    refuse("data", "classifier", "checkerboard-align-your-flow", "--out", tmp_path / "x", says=("takes images",))


# --- the user's own function

OWN = """
import torch

def flat(images):
    return images.flatten(1).double()

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.scale * images.float().mean((2, 3))

def square(images):
    return images

def loses(images):
    return images[1:].flatten(1)

def nothing(images):
    pass

def breaks(images):
    raise RuntimeError("weights\\nare gone")

number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_features_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_features_of_a_test", None)
    return "callable:own_features_of_a_test"


def test_a_users_function_and_module(own_module) -> None:
    images = grey_levels(3, 2, 4, 4)
    made = build_extractor(f"{own_module}:flat")
    assert isinstance(made, FeatureExtractor)
    assert (made.name, made.takes) == ("unverified_flat", "uint8")
    assert made.name == extractor_name(f"{own_module}:flat")
    assert made.digest.startswith("unverified-")
    found = extract(made, images)
    assert found.dtype == torch.float32
    assert torch.equal(found, images.flatten(1).float())
    module = build_extractor(f"{own_module}:Mean")
    torch.testing.assert_close(extract(module, images), 2 * images.float().mean((2, 3)))
    assert not module.function.training
    assert module.digest != made.digest
    assert module.digest == build_extractor(f"{own_module}:Mean").digest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("square", "a tensor [3, 2, 4, 4] for 3 images"),
        ("loses", "a tensor [2, 32] for 3 images"),
        ("nothing", "a NoneType for 3 images"),
        ("breaks", "RuntimeError: weights are gone"),
    ],
)
def test_functions_that_give_no_features(own_module, name, says) -> None:
    with pytest.raises(UsageError) as caught:
        extract(build_extractor(f"{own_module}:{name}"), grey_levels(3, 2, 4, 4))
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_functions_that_are_not_there(own_module) -> None:
    for name, says in ((f"{own_module}:absent", "AttributeError"), (f"{own_module}:number", "has to be a function")):
        with pytest.raises(UsageError, match=says):
            build_extractor(name)
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        build_extractor("callable:no_such_module_of_a_test:f")
