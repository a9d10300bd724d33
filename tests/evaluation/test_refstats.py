"""Reference statistics in files: ours, and those of other projects."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data.config import DigitsConfig
from fewstep.data.load import load_data
from fewstep.errors import UsageError
from fewstep.evaluation.extractor import Everything
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.imported import imported_reference, read_imported, read_samples, serves
from fewstep.evaluation.metrics import compare, outcome
from fewstep.evaluation.reference import ReferenceFeatures, reference_features
from fewstep.evaluation.references import known_references
from fewstep.evaluation.refstats import read_refstats, write_refstats

CPU = torch.device("cpu")
PIXELS = build_extractor("pixels")
GENERATED = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference() -> ReferenceFeatures:
    return reference_features(PIXELS, load_data(DigitsConfig()), CPU)


@pytest.fixture(scope="module")
def file(reference: ReferenceFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "digits.refstats.safetensors"
    write_refstats(path, reference, dataset="digits", dataset_digest="d1", kind="image")
    return path


def test_a_file_gives_the_numbers_of_the_data_to_the_bit(reference: ReferenceFeatures, file: Path) -> None:
    read = read_refstats(file, PIXELS, CPU)
    assert compare(read, GENERATED) == compare(reference, GENERATED)
    assert read.facts == {"dataset": "digits", "digest": "d1", "kind": "image", "n": 1797, "imported": False}


def test_another_extractor_is_refused_by_name(file: Path) -> None:
    with pytest.raises(UsageError, match="another extractor: pixels, and this evaluation has digits"):
        read_refstats(file, build_extractor("digits"), CPU)
    with pytest.raises(UsageError, match="of pixels features, and this evaluation has digits"):
        known_references([file], [build_extractor("digits")], (1, 8, 8), CPU)


def test_other_weights_or_preprocessing_are_refused(reference: ReferenceFeatures, tmp_path: Path) -> None:
    from dataclasses import replace

    other = replace(PIXELS, digest="another")  # type: ignore[type-var]
    path = tmp_path / "x.refstats.safetensors"
    write_refstats(path, replace(reference, extractor=other), dataset="d", dataset_digest="d", kind="image")
    with pytest.raises(UsageError, match="another extractor_digest: another"):
        read_refstats(path, PIXELS, CPU)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_what_is_cut_short_says_so(file: Path, tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.refstats.safetensors"
    cut.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UsageError, match="damaged or cut short"):
        read_refstats(cut, PIXELS, CPU)
    with pytest.raises(UsageError, match="fewstep data stats"):
        read_refstats(tmp_path / "none.refstats.safetensors", PIXELS, CPU)


# Others' files -------------------------------------------------------------------------------------------------------


def test_mu_and_sigma_give_the_frechet_distance_and_nothing_else(reference: ReferenceFeatures, tmp_path: Path) -> None:
    path = tmp_path / "clean-fid.npz"
    moments = reference.moments
    np.savez(path, mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    (found,) = known_references([path], [build_extractor("identity"), PIXELS], (1, 8, 8), CPU)
    assert found.facts["imported"] is True
    assert found.facts["n"] is None
    measured = outcome(found, Everything(GENERATED, None, None)).metrics
    assert set(measured) == {"fd_identity", "fd_debiased_identity"}  # the first of two that fit
    assert measured["fd_identity"].value == pytest.approx(compare(reference, GENERATED)["fd_pixels"], rel=1e-9)


def test_the_images_of_adm_bring_neighbours_and_kernel(reference: ReferenceFeatures, tmp_path: Path) -> None:
    """Moments are those of the file, neighbours those of its images."""
    data = load_data(DigitsConfig())
    images = ((data.samples(torch.arange(200)) * 127.5 + 128).clamp(0, 255)).to(torch.uint8)
    path = tmp_path / "VIRTUAL_imagenet.npz"
    moments = reference.moments
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(
        path,
        mu=moments.mean.numpy(),
        sigma=moments.cov.numpy(),
        arr_0=images.permute(0, 2, 3, 1).numpy(),
        **spatial,
    )
    imported = read_imported(path)
    assert imported.spatial is not None
    assert imported.spatial.mean.shape == (3,)
    found = imported_reference(imported, PIXELS, CPU)
    torch.testing.assert_close(found.features, PIXELS(images))
    values = compare(found, GENERATED)
    assert values["fd_pixels"] == pytest.approx(compare(reference, GENERATED)["fd_pixels"], rel=1e-9)
    assert "recall_pixels" in values
    assert torch.equal(read_samples(path), images)


def test_pickles_are_read_without_running_them(reference: ReferenceFeatures, tmp_path: Path) -> None:
    mean, cov = reference.moments.mean.numpy(), reference.moments.cov.numpy()
    edm2 = tmp_path / "edm2.pkl"
    edm2.write_bytes(
        pickle.dumps({"fid": {"mu": mean, "sigma": cov}, "fd_dinov2": {"mu": mean[:5], "sigma": cov[:5, :5]}})
    )
    assert read_imported(edm2, "fid").dim == 64
    assert read_imported(edm2, "fd_dinov2").dim == 5
    n = 50
    sums = tmp_path / "stylegan.pkl"
    sums.write_bytes(
        pickle.dumps(
            {"num_items": n, "raw_mean": mean * n, "raw_cov": (cov + np.outer(mean, mean)) * n, "capture_all": False}
        )
    )
    found = read_imported(sums)
    assert found.n == n
    np.testing.assert_allclose(found.cov, cov, atol=1e-12)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    evil = tmp_path / "evil.pkl"
    evil.write_bytes(pickle.dumps({"fid": {"mu": Evil()}}))
    with pytest.raises(UsageError, match="would run as code"):
        read_imported(evil)
    np.savez(tmp_path / "evil.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    with pytest.raises(UsageError, match="without running it"):
        read_imported(tmp_path / "evil.npz")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "covariance"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is"),
        ({"feats": np.zeros(3)}, "feats"),
    ],
)
def test_what_holds_no_statistics(arrays: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=says):
        read_imported(tmp_path / "x.npz")


def test_a_file_is_for_the_extractor_of_its_dimension(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mu=np.zeros(4), sigma=np.eye(4))
    found = read_imported(tmp_path / "x.npz")
    sizes = collections.OrderedDict(pixels=4, inception=4)
    assert serves(found, sizes) == "inception"
    with pytest.raises(UsageError, match="of 4 dimensions: digits has 64"):
        serves(found, {"digits": 64})
    with pytest.raises(UsageError, match="no file of reference statistics"):
        known_references([tmp_path / "x.csv"], [PIXELS], (1, 8, 8), CPU)
