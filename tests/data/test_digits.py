"""The shipped digits are the UCI data, whole and unaltered."""

import json
from importlib.resources import files

import pytest
import torch

from fewstep.data.load import digits


def test_images_and_classes() -> None:
    """1,797 images with values 0 to 16 mapped to [-1, 1]; the class counts are those of the data set's description."""
    data = digits()
    assert data.x.shape == (1797, 1, 8, 8)
    levels = (data.x + 1) * 8
    assert torch.equal(levels, levels.round())
    assert (levels.min(), levels.max()) == (0, 16)
    assert data.label is not None
    assert data.label.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (data.shape, data.num_classes, data.kind) == ((1, 8, 8), 10, "image")


def test_equal_to_the_copy_scikit_learn_ships() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    data = digits()
    assert torch.equal(data.x[:, 0].double(), torch.from_numpy(theirs.images) / 8 - 1)
    assert data.label is not None
    assert data.label.tolist() == theirs.target.tolist()


def test_source_and_licence_travel_with_the_file() -> None:
    content = (files("fewstep.data") / "digits.safetensors").read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert metadata["licence"] == "CC BY 4.0"
    assert "doi:10.24432/C50P49" in metadata["source"]
