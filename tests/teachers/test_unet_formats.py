"""Checkpoints of torchcfm, flow_matching and RectifiedFlow: every name and shape, and what is read from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.conversion import canonical_velocity
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.adm import ADM
from fewstep.networks.foreign.config import ADMConfig, ForeignBlock, NCSNPPConfig
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.ncsnpp import NCSNPP
from fewstep.teachers.formats.base import Format, Found
from fewstep.teachers.formats.flow_matching import FLOW_MATCHING
from fewstep.teachers.formats.rectified_flow import RECTIFIED_FLOW
from fewstep.teachers.formats.torchcfm import TORCHCFM

FLOW_MATCHING_CIFAR = ADMConfig(
    channel_mult=(2, 2, 2),
    num_res_blocks=4,
    use_new_attention_order=True,
    use_scale_shift_norm=True,
    conv_resample=False,
)
FLOW_MATCHING_IMAGENET = ADMConfig(
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_levels=(1, 2, 3),
    num_heads=4,
    num_head_channels=64,
    use_new_attention_order=True,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
FACES = NCSNPPConfig(
    ch_mult=(1, 1, 2, 2, 2, 2, 2),
    num_res_blocks=2,
    attention_levels=(4,),
    embedding_type="fourier",
    progressive="output_skip",
    progressive_input="input_skip",
    fir=True,
    scale_by_sigma=True,
    num_scales=2000,
)
LAYOUTS: dict[str, tuple[Format, ForeignBlock, int, int, dict[str, Any]]] = {
    "torchcfm-cifar10": (TORCHCFM, ADMConfig(num_heads=4, num_head_channels=64), 0, 32, {}),
    "flow-matching-cifar10": (FLOW_MATCHING, FLOW_MATCHING_CIFAR, 0, 32, {}),
    "flow-matching-imagenet": (FLOW_MATCHING, FLOW_MATCHING_IMAGENET, 1000, 64, {}),
    "rectified-flow-cifar10": (RECTIFIED_FLOW, NCSNPPConfig(), 0, 32, {}),
    "rectified-flow-celeba-hq": (RECTIFIED_FLOW, FACES, 0, 256, {"centered": True}),
}
"""State dicts of the projects' own classes (torchcfm at its commit cacd4dc, flow_matching at 11568d3, RectifiedFlow at
5a1fd4d), name and shape a line: format, config, classes, pixels, and what has to be said."""


def layout(name: str) -> dict[str, Tensor]:
    """Weights without numbers, under the names and of the shapes of a published network, in its order."""
    lines = (Path(__file__).parent / "layouts" / f"{name}.txt").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in map(str.split, lines)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def built(config: ForeignBlock, shape: tuple[int, ...], classes: int) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config, ADMConfig):
            return ADM(shape, config, classes)
        assert isinstance(config, NCSNPPConfig)
        return NCSNPP(shape, config, classes)


def weights_of(config: ForeignBlock, classes: int = 0, channels: int = 3) -> dict[str, Tensor]:
    return dict(built(config, (channels, 64, 64), classes).state_dict())


def unread(found: Found) -> ForeignBlock:
    """The network found, but for its convention."""
    return found.network.model_copy(update={"convention": type(found.network)().convention})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_name_and_shape_in_order(name: str) -> None:
    _, config, classes, side, _ = LAYOUTS[name]
    net = built(config, (3, side, side), classes)
    ours = [(key, tuple(value.shape)) for key, value in net.state_dict().items()]
    assert ours == [(key, tuple(value.shape)) for key, value in layout(name).items()]
    # Averages of weights are lists in the order of the parameters.
    parameters = [key for key, _ in net.named_parameters()]
    assert parameters == [key for key, _ in ours if key != "sigmas"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_networks_are_read_from_their_shapes(name: str) -> None:
    fmt, config, classes, _, said = LAYOUTS[name]
    weights = layout(name)
    assert fmt.recognises(weights)
    found = fmt.read(weights, said)
    assert unread(found) == config
    assert found.network.convention == fmt.convention
    assert (found.channels, found.side, found.num_classes, found.left_out) == (3, None, classes, ())
    assert list(found.weights) == list(weights)
    others = (
        {TORCHCFM, FLOW_MATCHING, RECTIFIED_FLOW}
        - {fmt}
        - ({TORCHCFM, FLOW_MATCHING} if fmt.name != "rectified_flow" else set())
    )
    assert not any(other.recognises(weights) for other in others)


SMALL = ADMConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_heads=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_mult": (1.0,), "attention_levels": ()},
        {"channel_mult": (1, 1, 3), "attention_levels": (0, 2), "num_res_blocks": 3},
        {"channel_mult": (2, 1), "attention_levels": (), "conv_resample": False},
        {"resblock_updown": True, "use_scale_shift_norm": True, "num_heads": 4, "num_heads_upsample": 2},
        {"resblock_updown": True, "channel_mult": (1, 1, 1, 1), "num_head_channels": 8, "attention_levels": (0, 1, 2)},
        {"learn_sigma": True, "use_new_attention_order": True},
    ],
)
@pytest.mark.parametrize("fmt", [TORCHCFM, FLOW_MATCHING], ids=["torchcfm", "flow_matching"])
def test_other_unets_are_read_too(fmt: Format, changes: dict[str, Any]) -> None:
    """Classes: in flow_matching a row of the table stands for none of them."""
    null_row = fmt is FLOW_MATCHING
    config = ADMConfig.model_validate({**SMALL.model_dump(), **changes, "null_row": null_row})
    said = {name: getattr(config, name) for name in ("num_heads", "num_head_channels", "num_heads_upsample")}
    said["use_new_attention_order"] = config.use_new_attention_order
    for classes in (0, 7):
        wanted = config if classes else config.model_copy(update={"null_row": True})
        found = fmt.read(weights_of(config, classes, channels=1), said)
        assert (unread(found), found.channels, found.num_classes) == (wanted, 1, classes)


@pytest.mark.parametrize(
    "config",
    [
        NCSNPPConfig(nf=32, ch_mult=(1,), num_res_blocks=2, attention_levels=(0,)),
        NCSNPPConfig(nf=32, ch_mult=(1, 3, 2), num_res_blocks=1, attention_levels=(), fir=True),
        NCSNPPConfig(nf=32, ch_mult=(2, 1), num_res_blocks=3, attention_levels=(0, 1), embedding_type="fourier"),
        NCSNPPConfig(nf=32, ch_mult=(1, 2), num_res_blocks=1, progressive="output_skip", centered=False),
        NCSNPPConfig(nf=32, ch_mult=(1, 1), attention_levels=(1,), progressive_input="input_skip", skip_rescale=False),
    ],
)
def test_other_networks_of_score_sde_are_read_too(config: NCSNPPConfig) -> None:
    said = {name: getattr(config, name) for name in ("fir", "skip_rescale", "scale_by_sigma", "centered")}
    found = RECTIFIED_FLOW.read(weights_of(config, channels=1), said)
    assert (unread(found), found.channels, found.num_classes) == (config, 1, 0)


# ----------------------------------------------------------------------------------------------------- what users say


def test_what_is_said_stands_beside_what_is_published() -> None:
    weights = layout("torchcfm-cifar10")
    assert unread(TORCHCFM.read(weights, {"num_heads": 2})) == ADMConfig(num_heads=2)
    said = TORCHCFM.read(weights, {"use_new_attention_order": True}).network
    assert said.model_dump()["num_head_channels"] == 64
    assert said.model_dump()["use_new_attention_order"]
    trigonometric = TORCHCFM.read(weights, {"convention": {"path": "cosine"}}).network.convention
    assert trigonometric == TORCHCFM.convention.model_copy(update={"path": "cosine"})


def test_a_table_with_a_row_for_no_class() -> None:
    config = SMALL.model_copy(update={"num_heads": 1})
    weights = weights_of(config, 10)
    for said, classes in (({}, 11), ({"null_row": True}, 10)):
        found = TORCHCFM.read(weights, {"num_heads": 1, **said})
        assert (found.num_classes, found.network.model_dump()["null_row"]) == (classes, bool(said))


def test_one_head_needs_no_order() -> None:
    assert TORCHCFM.read(weights_of(SMALL), {"num_heads": 1})
    with pytest.raises(ValueError, match="declare use_new_attention_order"):
        TORCHCFM.read(weights_of(SMALL), {"num_heads": 2})
    with pytest.raises(ValueError, match="declare use_new_attention_order"):
        FLOW_MATCHING.read(weights_of(SMALL), {"num_head_channels": 32})


@pytest.mark.parametrize(
    ("fmt", "config", "said", "message"),
    [
        (TORCHCFM, SMALL, {}, "do not say how many heads attend: declare num_heads or num_head_channels"),
        (TORCHCFM, SMALL, {"num_heads": 1, "model_channels": 64}, "model_channels is 32 by the weights, and 64"),
        (TORCHCFM, SMALL, {"num_heads": 1, "heads": 4}, "Extra inputs are not permitted"),
        (RECTIFIED_FLOW, NCSNPPConfig(nf=32), {}, "declare fir, skip_rescale, centered"),
        (RECTIFIED_FLOW, FACES, {}, "of this RectifiedFlow network: declare centered$"),
        (RECTIFIED_FLOW, NCSNPPConfig(), {"nf": 64}, "nf is 128 by the weights, and 64 was declared"),
        (RECTIFIED_FLOW, NCSNPPConfig(), {"scale_by_sigma": True}, "scale_by_sigma belongs to embedding_type fourier"),
    ],
)
def test_what_has_to_be_said_and_what_cannot_be(
    fmt: Format, config: ForeignBlock, said: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fmt.read(weights_of(config), said)


# ------------------------------------------------------------------------------------------------ what is not whole


def changed(weights: dict[str, Tensor], *without: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    kept = (
        {name: value for name, value in weights.items() if not name.startswith(without)} if without else dict(weights)
    )
    return kept | {name.replace("__", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "without", "shapes", "message"),
    [
        ("torchcfm-cifar10", ("time_embed.0",), {}, "no time_embed.0.weight: it is not a whole torchcfm checkpoint"),
        ("torchcfm-cifar10", ("input_blocks.0",), {}, "no input_blocks.0.0.weight: it is not a whole"),
        ("torchcfm-cifar10", ("out.",), {}, "no out.2.weight: it is not a whole torchcfm checkpoint"),
        ("torchcfm-cifar10", ("output_blocks.11",), {}, "do not fit together: it is not a whole torchcfm"),
        ("torchcfm-cifar10", ("output_blocks.4",), {}, "do not fit together"),
        ("torchcfm-cifar10", ("input_blocks.11", "output_blocks.11"), {}, "do not fit together"),
        ("torchcfm-cifar10", ("output_blocks",), {}, "do not fit together"),
        ("torchcfm-cifar10", ("input_blocks.6.",), {}, "do not fit together"),
        ("torchcfm-cifar10", ("input_blocks.4.0.out",), {}, "no input_blocks.4.0.out_layers.0.weight"),
        ("torchcfm-cifar10", ("input_blocks.1.0.emb",), {}, "no input_blocks.1.0.emb_layers.1.weight"),
        ("torchcfm-cifar10", (), {"out__2__weight": (5, 128, 3, 3)}, "the network makes 5 channels of 3"),
        ("torchcfm-cifar10", (), {"input_blocks__0__0__weight": (128, 15, 3, 3)}, "with_fourier_features"),
        ("torchcfm-cifar10", (), {"input_blocks__0__0__weight": (64, 3, 3, 3)}, "makes 64 channels, where 128"),
        ("torchcfm-cifar10", (), {"time_embed__0__weight": (512, 64)}, "time_embed.0.weight is 512 x 64"),
        ("torchcfm-cifar10", (), {"time_embed__0__weight": (512,)}, r"time_embed.0.weight has shape \[512\]"),
        ("flow-matching-cifar10", ("input_blocks.7.",), {}, "do not fit together: it is not a whole flow_matching"),
        ("flow-matching-imagenet", ("output_blocks.3.2",), {}, "do not fit together"),
        ("flow-matching-imagenet", (), {"label_emb__weight": (768,)}, r"label_emb.weight has shape \[768\]"),
        ("rectified-flow-cifar10", ("sigmas",), {}, "no sigmas: it is not a whole RectifiedFlow checkpoint"),
        ("rectified-flow-cifar10", ("all_modules.30.",), {}, "no all_modules.30: it is not a whole RectifiedFlow"),
        ("rectified-flow-cifar10", ("all_modules.0.",), {}, "no all_modules.0: it is not a whole RectifiedFlow"),
        ("rectified-flow-cifar10", ("all_modules.3.Conv_0",), {}, "no all_modules.3.Conv_0.weight"),
        ("rectified-flow-cifar10", ("all_modules.3.GroupNorm_1",), {}, "do not follow each other"),
        ("rectified-flow-cifar10", ("all_modules.5", "all_modules.6"), {}, "no all_modules.5: it is not a whole"),
        ("rectified-flow-cifar10", ("all_modules.",), {}, "no all_modules.0: it is not a whole"),
        ("rectified-flow-cifar10", (), {"all_modules__2__weight": (128,)}, "do not begin with an embedding of time"),
        ("rectified-flow-cifar10", (), {"all_modules__0__weight": (512, 64)}, "do not follow each other"),
        ("rectified-flow-cifar10", (), {"all_modules__3__NIN_0__W": (128, 128)}, "resblock_type ddpm: only biggan"),
        ("rectified-flow-celeba-hq", ("all_modules.0.",), {}, "no all_modules.0: it is not a whole"),
    ],
)
def test_weights_that_are_not_whole(
    name: str, without: tuple[str, ...], shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    fmt = LAYOUTS[name][0]
    with pytest.raises(ValueError, match=message) as caught:
        fmt.read(changed(layout(name), *without, **shapes), {"centered": True} if fmt is RECTIFIED_FLOW else {})
    assert not isinstance(caught.value, ValidationError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_module_may_be_missing(name: str) -> None:
    """What is read is refused in one sentence or read as before; nothing else happens."""
    fmt, config, _, _, said = LAYOUTS[name]
    weights = layout(name)
    prefixes = sorted({key.rsplit(".", 1)[0] for key in weights if "." in key})
    for prefix in prefixes[:: max(1, len(prefixes) // 40)]:
        sentence = ""
        try:
            assert isinstance(fmt.read(changed(weights, f"{prefix}."), said).network, type(config))
        except ValueError as error:
            sentence = str(error)
        assert "\n" not in sentence


# ------------------------------------------------------------------------------------------------------- conventions


@pytest.mark.parametrize("fmt", [TORCHCFM, FLOW_MATCHING, RECTIFIED_FLOW], ids=lambda fmt: fmt.name)
def test_the_velocity_of_a_gaussian(fmt: Format) -> None:
    """Data N(m, s^2), of which the project's velocity is known in its own time: w(x, tau) with data at 1."""
    mean, sd = 0.7, 0.3
    scale = 999 if fmt is RECTIFIED_FLOW else 1

    def theirs(x: Tensor, time_B: Tensor) -> Tensor:
        tau = time_B[:, None] / scale
        spread = (sd * tau) ** 2 + (1 - tau) ** 2
        return mean + (sd**2 * tau - (1 - tau)) / spread * (x - tau * mean)

    t = torch.tensor([0.0, 0.2, 0.6, 0.999], dtype=torch.float64)
    x = torch.linspace(-1, 1.5, 4, dtype=torch.float64)[:, None]
    found = canonical_velocity(fmt.convention, theirs, x, t)
    at, spread = t[:, None], (sd * (1 - t[:, None])) ** 2 + t[:, None] ** 2
    wanted = -mean + (at - sd**2 * (1 - at)) / spread * (x - (1 - at) * mean)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fmt", [TORCHCFM, RECTIFIED_FLOW], ids=lambda fmt: fmt.name)
def test_a_student_starts_as_its_teacher(fmt: Format) -> None:
    """For every second time, to the bit; and moves with its time at noise too, where RectifiedFlow's times end."""
    torch.manual_seed(0)
    raw: nn.Module = ADM((1, 8, 8), SMALL, 3)
    if fmt is RECTIFIED_FLOW:
        large = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attention_levels": ()}
        raw = NCSNPP((1, 8, 8), FACES.model_copy(update=large), 0)
    for parameter in raw.parameters():
        nn.init.normal_(parameter, std=0.1)
    raw.double()
    student = ForeignNetwork(raw, fmt.convention, Inputs(3, two_times=True, guidance=True)).double()
    x, label = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1])
    t = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)
    teacher = canonical_velocity(fmt.convention, lambda z, tau: raw(z, tau, label), x, t)
    assert teacher.isfinite().all()
    assert all(torch.equal(student(x, t, r, label), teacher) for r in (t, t / 2, torch.zeros_like(t)))
    inside = torch.tensor([0.3, 0.9, 0.99], dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        along = (torch.randn_like(x), torch.ones_like(t))
        _, found = torch.func.jvp(lambda z, s: student(z, s, s / 2, label), (x, inside), along)
        h = 1e-6
        ahead, behind = (student(x + s * along[0], inside + s, (inside + s) / 2, label) for s in (h, -h))
        _, last = torch.func.jvp(lambda z, s: student(z, s, s / 2, label), (x, t), along)
    assert ((ahead - behind) / (2 * h) - found).norm() < 1e-6 * found.norm()
    assert last.isfinite().all()
