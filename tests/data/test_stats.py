"""Statistics of data: closed forms on the shipped digits, and the file that other tools read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import succeed
from written import as_folder, images

from fewstep.data.load import digits
from fewstep.evaluation.features import build_extractor, extract
from fewstep.evaluation.frechet import moments
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.reference import feature_moments, real_features

CPU = torch.device("cpu")


def test_means_deviations_and_counts(tmp_path: Path) -> None:
    x, label = images()
    found = json.loads(succeed("data", "stats", as_folder(tmp_path / "digits"), "--json").stdout)
    pixels = x.double() / 127.5 - 1
    assert found["mean"] == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert found["std"] == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)
    assert found["class_counts"] == label.bincount().tolist()
    assert (found["low"], found["high"], found["shape"], found["count"]) == (0, 255, [1, 8, 8], 300)


def test_of_a_recipe_and_per_channel() -> None:
    found = json.loads(succeed("data", "stats", "digits-teacher", "--json").stdout)
    assert (found["name"], found["stored"], found["count"]) == ("digits", "samples", 1797)
    assert found["mean"] == pytest.approx([digits().x.double().mean().item()])
    points = json.loads(succeed("data", "inspect", "moons-teacher", "--json").stdout)
    assert (len(points["mean"]), points["num_classes"]) == (2, 2)


def test_statistics_of_features_in_a_file(tmp_path: Path) -> None:
    """numpy's own mean and covariance of the pixels, under the keys of EDM and pytorch-fid."""
    out = tmp_path / "digits.npz"
    folder = as_folder(tmp_path / "digits")
    said = json.loads(succeed("data", "stats", folder, "--features", "pixels", "--out", out, "--json").stdout)
    with np.load(out, allow_pickle=False) as found:
        pixels = images()[0].flatten(1).double().numpy() / 127.5 - 1
        np.testing.assert_allclose(found["mu"], pixels.mean(0), atol=1e-7)
        np.testing.assert_allclose(found["sigma"], np.cov(pixels, rowvar=False), atol=1e-7)
        assert found["mu"].dtype == found["sigma"].dtype == np.float64
        assert int(found["n"]) == 300
        assert str(found["features"]) == "pixels"
        assert str(found["extractor_digest"]) == build_extractor("pixels").digest
        assert str(found["dataset_digest"]) == said["digest"]
    first = out.read_bytes()
    succeed("data", "stats", folder, "--features", "pixels", "--out", out)
    assert out.read_bytes() == first


def test_features_of_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last block is one sample: 1,797 = 449 * 4 + 1."""
    data, extractor = digits(), build_extractor("digits")
    whole = extract(extractor, to_uint8(data.x))
    assert torch.equal(torch.cat(list(real_features(extractor, data, CPU))), whole)
    monkeypatch.setattr("fewstep.evaluation.reference._BLOCK", 449)
    found, expected = feature_moments(extractor, data, CPU), moments(whole)
    assert found.n == 1797
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.cov, expected.cov, rtol=1e-5, atol=1e-6)
