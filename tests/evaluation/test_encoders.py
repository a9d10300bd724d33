"""DINOv2 and CLIP from local folders: tiny random networks of transformers, against the same called by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.compat import prepare_torchvision
from fewstep.errors import EnvironmentFault, UsageError
from fewstep.evaluation.encoders import ENCODERS, Encoder, load_encoder, normalised, resample_positions
from fewstep.evaluation.extractor import Classifier, FeatureExtractor, Spatial
from fewstep.evaluation.features import build_extractor, extract, extractor_facts

CPU = torch.device("cpu")
TINY = {
    "dinov2": Encoder("dinov2", 16, 14, 70, "somebody/tiny-dinov2"),
    "clip": Encoder("clip", 12, 8, 32, "somebody/tiny-clip"),
}


@pytest.fixture(scope="module")
def transformers():
    prepare_torchvision()
    try:
        import transformers

        transformers.Dinov2Model, transformers.CLIPVisionModelWithProjection  # noqa: B018
    except Exception as error:
        pytest.skip(f"transformers does not import: {error}")
    return transformers


def tiny(transformers, family: str, **changes: object):
    """A random network in which every weight counts."""
    torch.manual_seed(0)
    if family == "dinov2":
        facts = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 70,
            "patch_size": 14,
        }
        network = transformers.Dinov2Model(transformers.Dinov2Config(**{**facts, **changes}))
    else:
        facts = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 12, "num_attention_heads": 2}
        more = {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
        config = transformers.CLIPVisionConfig(**{**facts, **more, **changes})
        network = transformers.CLIPVisionModelWithProjection(config)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return network.eval()


@pytest.fixture
def folders(transformers, tmp_path, monkeypatch) -> Path:
    for family in TINY:
        tiny(transformers, family).save_pretrained(tmp_path / family)
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    return tmp_path


def grey_levels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", TINY)
def test_features_are_the_networks_own(family, folders, transformers) -> None:
    """The class token behind the last norm; the image embedding at unit length. Input normalised by hand."""
    made = load_encoder(family, CPU, None, TINY)
    assert isinstance(made, FeatureExtractor)
    assert not isinstance(made, Classifier | Spatial)
    assert (made.name, made.dim, made.takes) == (family, TINY[family].dim, "uint8")
    assert extractor_facts(made).keys() == {"preprocessing", "weights", "dim", "digest"}
    assert extractor_facts(made)["weights"] == TINY[family].repository
    size = TINY[family].size
    images = grey_levels(5, 3, size, size)  # of the size wanted: bicubic filtering changes nothing
    mean, std = {
        "dinov2": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    }[family]
    pixels = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        output = tiny(transformers, family)(pixel_values=pixels.float())
    if family == "dinov2":
        expected = output.last_hidden_state[:, 0]
        torch.testing.assert_close(output.pooler_output, expected)
    else:
        expected = output.image_embeds / output.image_embeds.norm(dim=1, keepdim=True)
    found = extract(made, images, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extract(made, images[[3]]), found[[3]], rtol=1e-4, atol=1e-5)
    assert float(found.std(0).mean()) > 1e-3
    assert not found.requires_grad


@pytest.mark.parametrize("side", [20, 300])
def test_images_are_resized_by_antialiased_bicubic_filtering(side: int) -> None:
    """PIL's filter on floats, neither clipped nor quantised, the sides squeezed to a square."""
    from PIL import Image

    images = grey_levels(1, 3, side, side + 10)
    images[..., : side // 2] = 255
    images[..., side // 2 :] = 0
    pixels = normalised(images, TINY["dinov2"])
    plane = Image.fromarray(images[0, 0].numpy().astype(np.float32)).resize((70, 70), Image.Resampling.BICUBIC)
    levels = (pixels[0, 0] * 0.229 + 0.485) * 255
    np.testing.assert_allclose(levels.numpy(), np.asarray(plane), atol=0.02)
    assert levels.max() > 257  # overshoot beside the edge stays


def test_positions_are_resampled_as_the_original_does(transformers) -> None:
    """From 9 to 3 patches: Keys' cubic with a = -3/4 at ``(i + 1/2) 9 / 3.1 - 1/2``, borders repeated, by hand."""
    network = tiny(transformers, "dinov2", image_size=14 * 9)
    positions = network.embeddings.position_embeddings.detach().clone().double()
    weights = torch.zeros(3, 9, dtype=torch.float64)
    for i in range(3):
        at = (i + 0.5) * 9 / 3.1 - 0.5
        for j in range(int(at) - 1, int(at) + 3):
            d = abs(at - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), 8)] += near if d <= 1 else far
    expected = torch.einsum("ij,kl,jlc->ikc", weights, weights, positions[0, 1:].reshape(9, 9, 16))
    resample_positions(network, 3)
    found = network.embeddings.position_embeddings
    torch.testing.assert_close(found[0, 1:].double(), expected.reshape(9, 16), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, 0].double(), positions[:, 0])
    with torch.no_grad():
        assert network(pixel_values=torch.zeros(1, 3, 42, 42)).last_hidden_state.shape == (1, 10, 16)


def test_resampled_positions_are_used(folders, transformers) -> None:
    """At another size than the learnt one: the network with those positions, not the library's own resampling."""
    smaller = {"dinov2": Encoder("dinov2", 16, 14, 28, "somebody/tiny-dinov2")}
    made = load_encoder("dinov2", CPU, None, smaller)
    images = grey_levels(2, 3, 28, 28)
    network = tiny(transformers, "dinov2")
    with torch.no_grad():
        plain = network(pixel_values=normalised(images, smaller["dinov2"])).last_hidden_state[:, 0]
        resample_positions(network, 2)
        resampled = network(pixel_values=normalised(images, smaller["dinov2"])).last_hidden_state[:, 0]
    torch.testing.assert_close(extract(made, images), resampled)
    assert (plain - resampled).abs().max() > 1e-4


def test_digests_cover_weights_and_sizes(folders, transformers) -> None:
    first = load_encoder("clip", CPU, None, TINY).digest
    assert first == load_encoder("clip", CPU, folders / "clip", TINY).digest
    other = tiny(transformers, "clip")
    other.visual_projection.weight.data[0, 0] += 1
    other.save_pretrained(folders / "clip")
    assert load_encoder("clip", CPU, None, TINY).digest != first
    changed = load_encoder("clip", CPU, None, TINY).digest
    config = json.loads((folders / "clip" / "config.json").read_text())
    other.save_pretrained(folders / "clip", max_shard_size="2KB")
    assert len(list((folders / "clip").glob("*.safetensors"))) > 1
    assert load_encoder("clip", CPU, None, TINY).digest == changed
    (folders / "clip" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert load_encoder("clip", CPU, None, TINY).digest != changed


def test_a_whole_clip_serves(folders, transformers, capfd, caplog) -> None:
    """The repositories hold the text tower as well."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**vision, "vocab_size": 20, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    torch.manual_seed(1)
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(folders / "whole" / "clip")
    capfd.readouterr()
    caplog.clear()
    made = load_encoder("clip", CPU, folders / "whole", TINY)
    assert capfd.readouterr() == ("", "")  # no word of the text tower, no bar
    assert not caplog.records
    assert transformers.utils.logging.is_progress_bar_enabled()
    images = grey_levels(2, 3, 32, 32)
    with torch.no_grad():
        output = whole.vision_model(pixel_values=normalised(images, TINY["clip"])).pooler_output
        expected = torch.nn.functional.normalize(whole.visual_projection(output), dim=1)
    torch.testing.assert_close(extract(made, images), expected, rtol=1e-4, atol=1e-5)


def test_wrong_folders_are_refused_in_a_sentence(folders, transformers, tmp_path) -> None:
    def refusal(name: str, *says: str) -> None:
        with pytest.raises(EnvironmentFault) as caught:
            load_encoder(name, CPU, None, TINY)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for text in (*says, str(folders / name)):
            assert text in message

    with pytest.raises(EnvironmentFault, match="16 features"):
        load_encoder("dinov2", CPU, None, ENCODERS)
    tiny(transformers, "clip", projection_dim=10).save_pretrained(folders / "clip")
    refusal("clip", "10 features")
    tiny(transformers, "clip", image_size=64).save_pretrained(folders / "clip")
    refusal("clip", "images of 64")
    tiny(transformers, "dinov2").save_pretrained(folders / "clip")
    refusal("clip", "'dinov2'")
    tiny(transformers, "dinov2").save_pretrained(folders / "dinov2")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders / "dinov2" / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folders / "dinov2" / "model.safetensors", {"format": "pt"})
    refusal("dinov2", "1 tensors", "layernorm.weight")
    (folders / "dinov2" / "model.safetensors").write_bytes(b"broken")
    refusal("dinov2")
    (folders / "dinov2" / "config.json").write_text("{")
    refusal("dinov2")


def test_absent_folders_and_images_that_are_none(folders, monkeypatch) -> None:
    with pytest.raises(UsageError, match="2 channels"):
        load_encoder("clip", CPU, None, TINY)(grey_levels(1, 2, 8, 8))
    with pytest.raises(ValueError, match="to_uint8"):
        load_encoder("clip", CPU, None, TINY)(torch.zeros(1, 3, 8, 8))
    monkeypatch.delenv("FEWSTEP_WEIGHTS")
    for name, encoder in ENCODERS.items():
        with pytest.raises(EnvironmentFault, match=encoder.repository):
            build_extractor(name)
