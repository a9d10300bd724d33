"""Images through an autoencoder: the moments that it gives, those of the mirror image, and its scale."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refuse, succeed
from written import as_folder, images

from fewstep.compat import prepare_torchvision
from fewstep.data.config import LatentsConfig
from fewstep.data.load import load_data


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny one with random weights, and its folder."""
    diffusers = pytest.importorskip("diffusers")
    prepare_torchvision()  # which its models import
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        latent_channels=2,
        sample_size=8,
        scaling_factor=0.25,
        shift_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("autoencoder") / "tiny-vae"
    net.save_pretrained(folder)
    return folder, net.eval()


def test_images_become_moments(autoencoder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, net = autoencoder
    out = tmp_path / "latents"
    arguments = ("data", "prepare", as_folder(tmp_path / "digits"), "--channels", 3, "--encoder", folder, "--out", out)
    succeed(*arguments, "--shard-size", 100)
    data = load_data(LatentsConfig(path=str(out), flip=True))
    assert (data.shape, data.num_classes, len(data.x)) == ((2, 4, 4), 10, 300)
    assert data.mirrored is not None
    assert data.latent is not None
    rows = torch.tensor([0, 150, 299])
    x = (images()[0][rows].float() / 127.5 - 1).expand(-1, 3, -1, -1)
    for stored, pixels in ((data.x, x), (data.mirrored, x.flip(-1))):
        with torch.no_grad():
            expected = net.encode(pixels).latent_dist
        both = torch.cat((expected.mean, expected.std), 1)
        torch.testing.assert_close(stored[rows].float(), both, rtol=2e-3, atol=1e-4)
        assert not torch.allclose(both, both.flip(-1), atol=1e-2)
    assert (data.latent.scale.unique().tolist(), data.latent.shift.unique().tolist()) == ([0.25], [0.5])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["autoencoder"]["name"] == "tiny-vae"
    assert len(meta["autoencoder"]["digest"]) == 64
    refuse(*arguments, says=(str(out), "--overwrite"))
    grey = ("data", "prepare", tmp_path / "digits", "--encoder", folder, "--out", tmp_path / "grey")
    refuse(*grey, says=("3 channels", "--channels 3"))
    refuse("data", "prepare", out, "--encoder", folder, "--out", tmp_path / "twice", says=("latents", "takes images"))


def test_a_folder_that_is_no_autoencoder(tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "digits")
    arguments = ("data", "prepare", folder, "--out", tmp_path / "out", "--encoder", tmp_path / "vae")
    refuse(*arguments, says=(str(tmp_path / "vae"), "config.json"))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    refuse(*arguments, says=("diffusion_pytorch_model.safetensors",))


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vae").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / "vae" / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    arguments = ("data", "prepare", as_folder(tmp_path / "digits"), "--out", tmp_path / "out")
    refuse(*arguments, "--encoder", tmp_path / "vae", says=("pip install 'fewstep[diffusers]'",), code=3)
    assert not (tmp_path / "out").exists()
