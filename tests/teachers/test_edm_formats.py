"""Checkpoints of EDM and EDM2 are known by their names and read by their shapes, and pickles of theirs from end to
end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from teachers.persistence import persistent, write_snapshot
from torch import Tensor, nn

from fewstep.conversion import path_of
from fewstep.networks.foreign.config import EDM2Config, EDMConfig
from fewstep.networks.foreign.edm import EDM as EDMNetwork
from fewstep.networks.foreign.edm2 import EDM2 as EDM2Network
from fewstep.teachers.formats.base import Format
from fewstep.teachers.formats.edm import CONVENTION, EDM, EDM2
from fewstep.teachers.pickles import open_checkpoint

Config = EDMConfig | EDM2Config

LAYOUTS: dict[str, tuple[Format, Config, int, int]] = {
    "edm-cifar10-vp": (
        EDM,
        EDMConfig(arch="ddpmpp", channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), augment_dim=9),
        10,
        32,
    ),
    "edm-cifar10-ve": (
        EDM,
        EDMConfig(arch="ncsnpp", channels=128, multipliers=(2, 2, 2), blocks=4, attention=(16,), augment_dim=9),
        0,
        32,
    ),
    "edm-imagenet64-adm": (
        EDM,
        EDMConfig(arch="adm", channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8)),
        1000,
        64,
    ),
    "edm2-img512-xs": (EDM2, EDM2Config(channels=128), 1000, 64),
}
"""State dicts of the projects' own classes, a name and a shape a line: format, config, classes, side."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "edm-cifar10-vp": {
        "class_name": "training.networks.EDMPrecond",
        "img_resolution": 32,
        "model_type": "SongUNet",
        "channel_mult": [2, 2, 2],
        "dropout": 0.13,
        "use_fp16": False,
    },
    "edm-cifar10-ve": {"class_name": "EDMPrecond", "resample_filter": [1, 3, 3, 1], "model_channels": 128},
    "edm-imagenet64-adm": {"class_name": "EDMPrecond", "attn_resolutions": [32, 16, 8], "use_fp16": True},
    "edm2-img512-xs": {"class_name": "Precond", "model_channels": 128, "dropout": 0.0, "attn_resolutions": [16, 8]},
}
"""Some of what their pickles say beside."""


def layout(name: str) -> dict[str, Tensor]:
    """Weights without numbers, under the names and of the shapes of a published network, in its order."""
    lines = (Path(__file__).parent / "layouts" / f"{name}.txt").read_text().splitlines()
    return {
        key: torch.empty([int(size) for size in shape.split("x") if size != "-"], device="meta")
        for key, shape in map(str.split, lines)
    }


def built(config: Config, channels: int, side: int, classes: int) -> nn.Module:
    shape = (channels, side, side)
    if isinstance(config, EDMConfig):
        return EDMNetwork(shape, config, classes)
    return EDM2Network(shape, config, classes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_name_and_shape_in_order(name: str) -> None:
    fmt, config, classes, side = LAYOUTS[name]
    with torch.device("meta"):
        net = built(config, 3 if fmt is EDM else 4, side, classes)
    ours = [(key, tuple(value.shape)) for key, value in net.state_dict().items()]
    assert ours == [(key, tuple(value.shape)) for key, value in layout(name).items()]


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_networks_are_read_from_their_shapes(name: str, said: bool) -> None:
    fmt, config, classes, side = LAYOUTS[name]
    weights = layout(name)
    assert fmt.recognises(weights)
    assert not (EDM if fmt is EDM2 else EDM2).recognises(weights)
    found = fmt.read(weights, PUBLISHED[name] if said else {})
    assert found.network == config.model_copy(update={"convention": CONVENTION})
    assert (found.channels, found.side, found.num_classes) == (3 if fmt is EDM else 4, side, classes)
    assert list(found.weights) == list(weights)
    assert found.left_out == ()


def test_the_convention() -> None:
    """The network's time is its noise level, from 0.002 to 80."""
    ends = torch.tensor([CONVENTION.earliest, CONVENTION.latest], dtype=torch.float64)
    sigmas = path_of(CONVENTION).time_at(ends)
    torch.testing.assert_close(sigmas, torch.tensor([0.002, 80.0], dtype=torch.float64), rtol=1e-12, atol=0)


SMALL: dict[str, Config] = {
    "ddpmpp": EDMConfig(arch="ddpmpp", channels=16, multipliers=(1, 2, 1), blocks=1, attention=(4, 2), embedding=2),
    "ncsnpp": EDMConfig(arch="ncsnpp", channels=8, multipliers=(2,), blocks=2, attention=(), augment_dim=3),
    "adm": EDMConfig(arch="adm", channels=64, multipliers=(2, 1), blocks=1, attention=(8,)),
    "edm2": EDM2Config(channels=64, multipliers=(2, 3), blocks=1, attention=(), logvar_channels=8),
    "edm2-wide": EDM2Config(
        channels=64, multipliers=(1, 2), blocks=2, attention=(8,), noise_channels=32, embedding_channels=192
    ),
}


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("name", SMALL)
def test_other_sizes_are_read(name: str, classes: int) -> None:
    config = SMALL[name]
    weights = built(config, 2, 8, classes).state_dict()
    fmt = EDM2 if isinstance(config, EDM2Config) else EDM
    found = fmt.read(weights, {})
    assert found.network == config.model_copy(update={"convention": CONVENTION})
    assert (found.channels, found.side, found.num_classes) == (2, 8, classes)
    built(found.network, found.channels, 8, classes).load_state_dict(found.weights)  # type: ignore[arg-type]


def test_what_is_said_beyond_the_weights() -> None:
    found = EDM.read(layout("edm-cifar10-vp"), {"class_name": "VPPrecond", "beta_d": 19.9, "M": 1000})
    assert isinstance(found.network, EDMConfig)
    assert found.network.precond == "vp"
    found = EDM.read(layout("edm-cifar10-vp"), {"sigma_data": 0.3, "convention": {"latest": 0.99}})
    assert found.network.sigma_data == 0.3  # type: ignore[attr-defined]
    assert found.network.convention == CONVENTION.model_copy(update={"latest": 0.99})
    said = {"label_balance": 0.4, "clip_act": None, "channels_per_head": 32, "resample_filter": [1, 3, 3, 1]}
    edm2 = EDM2.read(layout("edm2-img512-xs"), said).network
    assert isinstance(edm2, EDM2Config)
    assert (edm2.label_balance, edm2.clip, edm2.head_channels) == (0.4, None, 32)
    assert edm2.resample_filter == (1, 3, 3, 1)


@pytest.mark.parametrize(
    ("name", "said", "says"),
    [
        ("edm-cifar10-vp", {"class_name": "iDDPMPrecond"}, "iDDPMPrecond are not read"),
        ("edm-cifar10-vp", {"class_name": "VPPrecond", "beta_d": 10}, "beta_d 10 is not read"),
        ("edm-cifar10-vp", {"channels": 64}, "channels is 128 by the weights, and 64 was declared"),
        ("edm-cifar10-vp", {"attn_resolutions": [16, 8]}, r"attention is \(16,\) by the weights, and \(16, 8\) was"),
        ("edm2-img512-xs", {"num_blocks": 2}, "blocks is 3 by the weights, and 2 was declared"),
        ("edm2-img512-xs", {"channels_per_head": 48}, "declare head_channels"),
        ("edm2-img512-xs", {"wings": 2}, "wings"),
    ],
)
def test_what_does_not_fit_the_weights(name: str, said: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LAYOUTS[name][0].read(layout(name), said)


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_of_a_checkpoint(name: str) -> None:
    """What the shapes are read from may be missing: one sentence, which names it, and no other error."""
    fmt, config, _, _ = LAYOUTS[name]
    weights = layout(name)
    for share in (0.01, 0.1, 0.4):
        half = dict(list(weights.items())[: int(share * len(weights))])
        with pytest.raises(ValueError, match="it is not a whole") as raised:
            fmt.read(half, {})
        assert "\n" not in str(raised.value)
    refused = 0
    for key in weights:
        try:
            found = fmt.read({each: value for each, value in weights.items() if each != key}, {})
        except ValueError:
            refused += 1
        else:  # which loading by name finds
            assert type(found.network) is type(config)
    assert refused >= 5


def test_a_network_that_predicts_variances() -> None:
    weights = layout("edm-imagenet64-adm")
    weights["model.out_conv.weight"] = torch.empty(6, 192, 3, 3, device="meta")
    with pytest.raises(ValueError, match="predicts a variance too"):
        EDM.read(weights, {})
    with pytest.raises(ValueError, match="predicts a variance too"):
        EDM.read({"u": torch.empty(1001), **layout("edm-imagenet64-adm")}, {})


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "edm2-wide"])
def test_from_a_pickle_to_the_same_network(name: str, tmp_path: Path) -> None:
    """A network's own snapshot says what it is: read without its code, it is the network again."""
    torch.manual_seed(0)
    config = SMALL[name]
    net = built(config, 3, 8, 4)
    for value in net.parameters():
        value.data = 0.1 * torch.randn_like(value)
    kwargs: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "use_fp16": False}
    kwargs |= {"model_channels": config.channels, "channel_mult": list(config.multipliers), "sigma_data": 0.4}
    kwargs |= {"num_blocks": config.blocks, "attn_resolutions": [*config.attention, 16], "dropout": 0.1}
    fmt, class_name = (EDM2, "Precond") if isinstance(config, EDM2Config) else (EDM, "EDMPrecond")
    file = write_snapshot(tmp_path / "snapshot.pkl", ema=persistent(net, kwargs, "raise SystemExit", class_name))
    opened = open_checkpoint(file)
    found = fmt.read(opened.tree["ema"], opened.said)
    assert isinstance(found.network, EDMConfig | EDM2Config)
    twin = built(found.network, found.channels, found.side or 0, found.num_classes)
    twin.load_state_dict(found.weights)
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 2.0]), torch.tensor([1, 4])
    wanted = built(config.model_copy(update={"sigma_data": 0.4}), 3, 8, 4)
    wanted.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, sigma, label), wanted(x, sigma, label))
    assert not torch.equal(twin(x, sigma, label), net(x, sigma, label))
