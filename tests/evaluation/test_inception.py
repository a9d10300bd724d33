"""Inception: bit for bit the networks of clean-fid and torch-fidelity with random weights made here; its inputs."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.errors import EnvironmentFault, UsageError
from fewstep.evaluation import inception_features
from fewstep.evaluation.extractor import Classifier, FeatureExtractor, Spatial
from fewstep.evaluation.features import build_extractor, extract, extract_everything, extractor_facts
from fewstep.evaluation.inception import InceptionNetwork, inception_network
from fewstep.evaluation.inception_features import (
    PREPROCESSINGS,
    Inception,
    TorchScriptInception,
    load_inception,
    resize_clean,
    resize_pytorch,
    resize_tensorflow,
)
from fewstep.evaluation.weights import INCEPTION, Weights, WeightsFile, cached_path

CPU = torch.device("cpu")


def grey_levels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights under which activations neither vanish nor explode, and every statistic of a norm counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = InceptionNetwork().state_dict()
    made = {}
    for name, like in shapes.items():
        noise = torch.randn(like.shape, generator=generator) if like.ndim else torch.tensor(0.0)
        if name.endswith("num_batches_tracked"):
            made[name] = torch.tensor(0)
        elif like.ndim >= 2:
            made[name] = noise * (2 / like[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            made[name] = 1 + 0.2 * noise.tanh()
        else:
            made[name] = 0.1 * noise + float(name.endswith("bn.weight"))
    return made


@pytest.fixture(scope="module")
def weights_file(state, tmp_path_factory) -> tuple[WeightsFile, Path]:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return WeightsFile("random.pth", hashlib.sha256(path.read_bytes()).hexdigest(), "random weights of a test"), path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return grey_levels(2, 3, 40, 48)


@pytest.fixture(scope="module")
def ours(state) -> InceptionNetwork:
    return inception_network(state)


def extractor(network: InceptionNetwork, name: str) -> Inception:
    return Inception(CPU, network, PREPROCESSINGS[name], name, "", "")


# --- second implementations


@torch.no_grad()
def test_bits_of_torch_fidelity(ours, images, weights_file) -> None:
    """Its ``inception-v3-compat``: TensorFlow's resize, pooled features, unbiased logits; the map by a hook."""
    prepare_torchvision()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        pytest.skip(f"torch-fidelity does not import: {error}")
    names = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("test", names, feature_extractor_weights_path=str(weights_file[1]))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert len(ours.state_dict()) == 566
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features, logits = theirs(images)
    found = extractor(ours, "inception_tensorflow").everything(images)
    assert torch.equal(found.features, features)
    assert torch.equal(found.logits, logits)
    assert found.spatial.shape == (2, 2023)
    assert torch.equal(found.spatial, seen[0][:, :7].movedim(1, -1).reshape(2, -1))  # H, W, C
    assert 0.1 < float(features.std()) < 10
    assert float(found.spatial.std()) > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
@torch.no_grad()
def test_bits_of_clean_fid(ours, state, images, monkeypatch) -> None:
    """Its ``legacy_pytorch`` extractor and resize, image by image as it does them."""
    prepare_torchvision()
    try:
        import cleanfid.inception_pytorch as theirs
        from cleanfid.features import build_feature_extractor
        from cleanfid.resize import build_resizer
    except Exception as error:
        pytest.skip(f"clean-fid does not import: {error}")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *arguments, **options: state)
    model = build_feature_extractor("legacy_pytorch", CPU, use_dataparallel=False)
    resize = build_resizer("legacy_pytorch")
    resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    expected = model(torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous())
    assert torch.equal(extractor(ours, "inception_pytorch")(images), expected)


@pytest.mark.parametrize("size", [8, 32, 299, 400])
def test_tensorflow_resize_by_hand(size: int) -> None:
    """At every target pixel ``i``: source position ``i s / 299``, its floor and the next pixel, the last repeated."""
    images = grey_levels(1, 1, size, size)
    at = np.arange(299, dtype=np.float32) * np.float32(size / 299)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, size - 1)
    part = (at - low).astype(np.float32)
    x = images[0, 0].numpy().astype(np.float64)
    rows = x[low] * (1 - part)[:, None] + x[high] * part[:, None]
    expected = rows[:, low] * (1 - part) + rows[:, high] * part
    np.testing.assert_allclose(resize_tensorflow(images, 299)[0, 0].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("size", [8, 32, 64, 400])
def test_resize_against_pil(size: int) -> None:
    """PIL's bicubic on float images, enlarging and reducing, clipped. Agreement to 0.01 of a grey level."""
    images = grey_levels(1, 2, size, size)
    resized = resize_clean(images, 299)
    for channel in range(2):
        plane = Image.fromarray(images[0, channel].numpy().astype(np.float32))
        expected = np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(resized[0, channel].numpy(), expected, atol=0.01)


def test_the_variants_differ_in_resize_and_scale() -> None:
    images = grey_levels(1, 3, 20, 20)
    found = [PREPROCESSINGS[name](images) for name in PREPROCESSINGS]
    assert all(each.shape == (1, 3, 299, 299) and each.dtype == torch.float32 for each in found)
    gaps = [(found[i] - found[j]).abs().mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(gaps) > 0.01
    assert resize_pytorch(images, 20).equal(images.float())
    constant = torch.full((1, 3, 5, 5), 64, dtype=torch.uint8)
    scaled = [float(PREPROCESSINGS[name](constant).mean()) for name in PREPROCESSINGS]
    assert scaled == pytest.approx([-0.5, -0.5, 2 * 64 / 255 - 1], abs=1e-6)


# --- the extractor


@torch.no_grad()
def test_one_pass_gives_everything(ours, images) -> None:
    made = extractor(ours, "inception")
    assert isinstance(made, FeatureExtractor)
    assert isinstance(made, Spatial)
    assert isinstance(made, Classifier)
    runs = []
    hook = ours.Mixed_6d.register_forward_hook(lambda *arguments: runs.append(1))
    found = extract_everything(made, images, batch_size=1)
    hook.remove()
    assert len(runs) == 2  # batches
    assert [part.shape for part in found] == [(2, 2048), (2, 1008), (2, 2023)]
    torch.testing.assert_close(extract(made, images[[1, 0]]), found.features[[1, 0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.spatial(images[1:2]), found.spatial[1:2], rtol=1e-4, atol=1e-5)
    weight = ours.fc.weight.double()
    torch.testing.assert_close(found.logits.double(), found.features.double() @ weight.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_grey_is_colour_and_other_channels_are_refused(ours) -> None:
    made = extractor(ours, "inception")
    grey = grey_levels(1, 1, 16, 16)
    assert torch.equal(made(grey), made(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(UsageError, match="2 channels"):
        made(grey_levels(1, 2, 8, 8))
    with pytest.raises(ValueError, match="to_uint8"):
        made(torch.zeros(1, 3, 8, 8))


def test_digests_cover_weights_and_preprocessing(weights_file, state, monkeypatch) -> None:
    monkeypatch.setattr(inception_features, "load_weights", lambda *_: Weights(file, content, digest))
    file, content, digest = weights_file[0], state, "1"
    first = [load_inception(name, CPU, None) for name in PREPROCESSINGS]
    assert [each.name for each in first] == list(PREPROCESSINGS)
    assert len({each.digest for each in first}) == 3
    assert extractor_facts(first[0]) == {
        "preprocessing": PREPROCESSINGS["inception"].text,
        "weights": "random.pth",
        "dim": 2048,
        "digest": first[0].digest,
    }
    assert load_inception("inception", CPU, None).digest == first[0].digest
    digest = "2"
    assert load_inception("inception", CPU, None).digest != first[0].digest


def test_weights_without_counts_of_batches_load(state, images) -> None:
    """Files of before PyTorch counted them have 472 entries."""
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) == 472
    assert len(inception_network(old).state_dict()) == 566


def test_the_conversion_serves_when_the_file_is_gone(weights_file, tmp_path, monkeypatch) -> None:
    """Converted once: the same digest from the cache, without unpickling. A damaged conversion is not used."""
    file, path = weights_file
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(path.parent))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    first = load_inception("inception", CPU, None, (file,))
    assert cached_path(file).is_file()
    monkeypatch.delenv("FEWSTEP_WEIGHTS")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled again"))
    again = load_inception("inception", CPU, None, (file,))
    assert again.digest == first.digest
    assert all(torch.equal(a, b) for a, b in zip(again.network.parameters(), first.network.parameters(), strict=True))
    content = bytearray(cached_path(file).read_bytes())
    content[-5] ^= 1
    cached_path(file).write_bytes(content)
    with pytest.raises(EnvironmentFault, match=r"no random\.pth"):
        load_inception("inception", CPU, None, (file,))


# --- the TorchScript file, with a stand-in


class Layers(torch.nn.Module):
    """Pools each channel and repeats it to 2048 features, so that the input can be read off the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).repeat(1, 683)[:, :2048, None, None]


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "renamed.pt"
    torch.jit.script(Network()).save(str(path))
    return WeightsFile("stand-in.pt", hashlib.sha256(path.read_bytes()).hexdigest(), "a test"), path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_scaling_and_grey_images(stand_in) -> None:
    """A constant image of level u stays constant when resized and enters as (u - 128) / 128 in all three channels."""
    file, path = stand_in
    made = load_inception("inception", CPU, path, (INCEPTION, file))
    assert isinstance(made, TorchScriptInception)
    assert made.weights == "stand-in.pt"
    assert not isinstance(made, Spatial | Classifier)
    levels = torch.tensor([0, 64, 255], dtype=torch.uint8)
    features = extract(made, levels[:, None, None, None].expand(3, 1, 16, 16), batch_size=2)
    assert features.shape == (3, made.dim)
    expected = ((levels.float() - 128) / 128)[:, None].expand(3, 2048)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    colour = extract_everything(made, grey_levels(2, 3, 20, 20))
    assert not torch.allclose(colour.features[:, 0], colour.features[:, 1])
    assert (colour.logits, colour.spatial) == (None, None)
    with pytest.raises(UsageError, match="2 channels"):
        made(grey_levels(1, 2, 8, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_torchscript_as_clean_fid_wraps_it(stand_in, tmp_path) -> None:
    prepare_torchvision()
    try:
        from cleanfid.inception_torchscript import InceptionV3W
    except Exception as error:
        pytest.skip(f"clean-fid does not import: {error}")
    file, path = stand_in
    (tmp_path / "inception-2015-12-05.pt").write_bytes(path.read_bytes())
    theirs = InceptionV3W(str(tmp_path), download=False, resize_inside=False)
    images = grey_levels(2, 3, 30, 30)
    made = load_inception("inception", CPU, path, (file,))
    assert torch.equal(made(images), theirs(resize_clean(images, 299)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_foreign_weights_are_never_loaded(stand_in, monkeypatch) -> None:
    _, path = stand_in
    for module, name in ((torch.jit, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("deserialised before it was verified"))
    for name in PREPROCESSINGS:
        with pytest.raises(EnvironmentFault, match="SHA-256"):
            build_extractor(name, weights=path)
