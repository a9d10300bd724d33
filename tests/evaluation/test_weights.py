"""The weights resolver: order of places, verification before use, and what the error says."""

import hashlib

import pytest
import torch

from fewstep.errors import EnvironmentFault
from fewstep.evaluation.weights import INCEPTION, WeightsFile, find_weights, read_verified

CONTENT = b"not a network"
FILE = WeightsFile("stand-in-weights.pt", hashlib.sha256(CONTENT).hexdigest(), "the stand-in of a test")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An environment whose three configurable places are empty folders of this test."""
    explicit, variable, hub = tmp_path / "explicit", tmp_path / "variable", tmp_path / "hub"
    for folder in (explicit, variable, hub / "checkpoints"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(variable))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    return explicit, variable, hub / "checkpoints"


def test_order_of_places(places):
    explicit, variable, hub = places
    for folder in (hub, variable, explicit):
        (folder / FILE.name).write_bytes(CONTENT)
    assert find_weights(FILE, explicit) == explicit / FILE.name
    assert find_weights(FILE) == variable / FILE.name
    (variable / FILE.name).unlink()
    assert find_weights(FILE) == hub / FILE.name


def test_a_place_may_be_the_file_itself(places, monkeypatch):
    _, variable, _ = places
    renamed = variable / "renamed.bin"
    renamed.write_bytes(CONTENT)
    assert find_weights(FILE, renamed) == renamed
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(renamed))
    assert find_weights(FILE) == renamed


def test_hub_folder_follows_torch_home(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / FILE.name).write_bytes(CONTENT)
    assert find_weights(FILE) == folder / FILE.name


def test_missing_file_names_everything_needed(places):
    _, variable, hub = places
    with pytest.raises(EnvironmentFault) as caught:
        find_weights(FILE)
    message = str(caught.value)
    for part in (FILE.name, FILE.sha256, FILE.source, str(variable), str(hub), "/tmp"):
        assert part in message
    assert caught.value.exit_code == 3


def test_an_explicit_path_is_the_only_place(places):
    """A wrong --weights must not be answered with a file from elsewhere."""
    explicit, variable, _ = places
    (variable / FILE.name).write_bytes(CONTENT)
    for path in (explicit, explicit / "typo.pt"):
        with pytest.raises(EnvironmentFault, match=str(path)):
            find_weights(FILE, path)


def test_verified_bytes_and_mismatch(tmp_path):
    path = tmp_path / FILE.name
    path.write_bytes(CONTENT)
    assert read_verified(FILE, path) == CONTENT
    path.write_bytes(CONTENT + b".")
    with pytest.raises(EnvironmentFault, match=FILE.sha256) as caught:
        read_verified(FILE, path)
    assert hashlib.sha256(CONTENT + b".").hexdigest() in str(caught.value)


def test_inception_is_pinned():
    assert INCEPTION.name == "inception-2015-12-05.pt"
    assert len(bytes.fromhex(INCEPTION.sha256)) == 32
