"""The weights resolver: order of places, verification before use, and what the error says."""

import hashlib
import pickle

import pytest
import torch

from fewstep.errors import EnvironmentFault
from fewstep.evaluation.extractor import tensors_digest
from fewstep.evaluation.weights import (
    INCEPTION,
    INCEPTION_FILES,
    INCEPTION_TORCHSCRIPT,
    Weights,
    WeightsFile,
    WeightsFolder,
    cached_path,
    find_folder,
    find_weights,
    load_weights,
    read_verified,
)

CONTENT = b"not a network"
FILE = WeightsFile("stand-in-weights.pt", hashlib.sha256(CONTENT).hexdigest(), "the stand-in of a test", ("other.pt",))
FILES = (FILE,)
FOLDER = WeightsFolder("encoder", "somebody/encoder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


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
    assert find_weights(FILES, explicit) == explicit / FILE.name
    assert find_weights(FILES) == variable / FILE.name
    (variable / FILE.name).unlink()
    assert find_weights(FILES) == hub / FILE.name


def test_a_place_may_be_the_file_itself(places, monkeypatch):
    _, variable, _ = places
    renamed = variable / "renamed.bin"
    renamed.write_bytes(CONTENT)
    assert find_weights(FILES, renamed) == renamed
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(renamed))
    assert find_weights(FILES) == renamed


def test_hub_folder_follows_torch_home(tmp_path, monkeypatch):
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / FILE.name).write_bytes(CONTENT)
    assert find_weights(FILES) == folder / FILE.name


def test_missing_file_names_everything_needed(places):
    _, variable, hub = places
    with pytest.raises(EnvironmentFault) as caught:
        find_weights(FILES)
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
            find_weights(FILES, path)


def test_verified_bytes_and_mismatch(tmp_path):
    path = tmp_path / FILE.name
    path.write_bytes(CONTENT)
    assert read_verified(FILES, path) == (FILE, CONTENT)
    path.write_bytes(CONTENT + b".")
    with pytest.raises(EnvironmentFault, match=FILE.sha256) as caught:
        read_verified(FILES, path)
    assert hashlib.sha256(CONTENT + b".").hexdigest() in str(caught.value)


def test_the_first_file_is_preferred_and_one_named_directly_is_taken(places, monkeypatch):
    """The better file wins wherever it lies; a file that the variable names is meant."""
    _, variable, hub = places
    second = WeightsFile("second.pt", hashlib.sha256(b"second").hexdigest(), "another")
    (variable / second.name).write_bytes(b"second")
    assert find_weights((FILE, second)) == variable / second.name
    (hub / "other.pt").write_bytes(CONTENT)
    assert find_weights((FILE, second)) == hub / "other.pt"
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(variable / second.name))
    assert find_weights((FILE, second)) == variable / second.name
    assert read_verified((FILE, second), variable / second.name) == (second, b"second")


def test_a_renamed_file_is_known_by_its_digest(tmp_path):
    path = tmp_path / INCEPTION.name
    path.write_bytes(CONTENT)
    with pytest.raises(EnvironmentFault, match=INCEPTION.sha256) as caught:  # the one that it is called
        read_verified(INCEPTION_FILES, path)
    assert INCEPTION_TORCHSCRIPT.sha256 not in str(caught.value)
    assert read_verified((*INCEPTION_FILES, FILE), path) == (FILE, CONTENT)
    with pytest.raises(EnvironmentFault, match="cannot read"):
        read_verified(FILES, tmp_path)


def test_the_cache_serves_unless_a_file_is_named(places, tmp_path, monkeypatch):
    """A state dict is kept as safetensors and found without the file; a named file is read itself."""
    _, variable, hub = places
    tensors = {"a": torch.arange(3.0), "n": torch.tensor(5)}
    torch.save(tensors, variable / "state.pth")
    file = WeightsFile("state.pth", hashlib.sha256((variable / "state.pth").read_bytes()).hexdigest(), "a test")
    assert not cached_path(file).exists()
    assert load_weights((file,)).content["a"].tolist() == [0, 1, 2]
    (variable / "state.pth").unlink()
    again = load_weights((FILE, file))
    assert again.file is file
    assert {name: tensor.tolist() for name, tensor in again.content.items()} == {"a": [0, 1, 2], "n": 5}
    with pytest.raises(EnvironmentFault, match=r"no state\.pth"):
        load_weights((file,), variable)
    with pytest.raises(EnvironmentFault, match=r"no state\.pth"):  # another file of that name
        load_weights((WeightsFile("state.pth", FILE.sha256, "a test"),))
    named = hub / "named.pt"
    named.write_bytes(CONTENT)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(named))
    assert load_weights((FILE, file)) == Weights(FILE, CONTENT, FILE.sha256)


def test_a_cache_that_cannot_be_written_is_no_error(places, tmp_path, monkeypatch):
    _, variable, _ = places
    torch.save({"a": torch.ones(1)}, variable / "state.pth")
    file = WeightsFile("state.pth", hashlib.sha256((variable / "state.pth").read_bytes()).hexdigest(), "a test")
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "taken"))
    assert load_weights((file,)).content["a"].tolist() == [1]


def test_a_pickle_that_runs_code_is_refused(places):
    """Even with the right digest, tensors are all that is unpickled."""
    _, variable, _ = places
    torch.save({"a": Runs()}, variable / "state.pth")
    file = WeightsFile("state.pth", hashlib.sha256((variable / "state.pth").read_bytes()).hexdigest(), "a test")
    with pytest.raises(pickle.UnpicklingError):
        load_weights((file,))


class Runs:
    def __reduce__(self):
        return pytest.fail, ("code of a pickle ran",)


def test_folders_of_encoders(places, monkeypatch):
    explicit, variable, _ = places
    with pytest.raises(EnvironmentFault, match="somebody/encoder") as caught:
        find_folder(FOLDER)
    assert str(variable / "encoder") in str(caught.value)
    assert caught.value.exit_code == 3
    for root in (explicit, variable):
        (root / "encoder").mkdir()
        (root / "encoder" / "config.json").write_text("{}")
    with pytest.raises(EnvironmentFault, match="safetensors"):
        find_folder(FOLDER)
    for root in (explicit, variable):
        (root / "encoder" / "model.safetensors").write_bytes(b"")
    assert find_folder(FOLDER) == variable / "encoder"
    assert find_folder(FOLDER, explicit) == explicit / "encoder"
    assert find_folder(FOLDER, explicit / "encoder") == explicit / "encoder"
    monkeypatch.delenv("FEWSTEP_WEIGHTS")
    with pytest.raises(EnvironmentFault, match="which is not set"):
        find_folder(FOLDER)


def test_inception_is_pinned():
    assert [file.name for file in INCEPTION_FILES] == [
        "pt_inception-2015-12-05-6726825d.pth",
        "inception-2015-12-05.pt",
    ]
    assert INCEPTION.sha256.startswith("6726825d")  # as its name says
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in INCEPTION_FILES)


def test_digests_of_tensors_see_names_shapes_types_and_values():
    base = {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(5)}
    others = (
        {"b": base["a"], "n": base["n"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {**base, "n": torch.tensor(6)},
        {"a": base["a"]},
    )
    digests = {tensors_digest(each) for each in (base, *others)}
    assert len(digests) == 6
    assert tensors_digest(dict(reversed(base.items()))) == tensors_digest(base)  # the order of a file is its own
    strided = torch.stack((base["a"], base["a"]), 2)[..., 0]
    assert tensors_digest({**base, "a": strided}) == tensors_digest(base)
