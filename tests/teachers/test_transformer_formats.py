"""Checkpoints of SiT, DiT, REPA and minRF: known by their names, read by their shapes, in their own conventions."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.conventions import ConventionConfig
from fewstep.conversion import canonical_velocity, noise_shares
from fewstep.networks.foreign.config import DiTConfig, MinRFConfig
from fewstep.networks.foreign.dit import DiT
from fewstep.networks.foreign.minrf import MinRF
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.convention import ConvertedField
from fewstep.teachers.formats.base import Format, Found
from fewstep.teachers.formats.minrf import MINRF
from fewstep.teachers.formats.shapes import classes
from fewstep.teachers.formats.sit import DIT, REPA, SIT

FORMATS = {each.name: each for each in (SIT, DIT, REPA, MINRF)}
LAYOUTS = {"sit": "sit-xl-2", "dit": "sit-xl-2", "repa": "repa-sit-xl-2", "minrf": "minrf-cifar"}
"""Names and shapes in order, written by the projects' own classes: SiT's, which is DiT's, at its commit 947f95b, REPA's
at 67f7145, minRF's for CIFAR-10 at 4fc10e0."""


def layout(name: str) -> dict[str, tuple[int, ...]]:
    lines = (Path(__file__).parent / "layouts" / f"{name}.txt").read_text().splitlines()
    return {key: tuple(map(int, shape.split("x"))) for key, shape in (line.split() for line in lines)}


def weights(name: str) -> dict[str, Tensor]:
    """The layout as tensors that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in layout(name).items()}


def small(**changes: Any) -> dict[str, Tensor]:
    """A DiT of no published size."""
    config = DiTConfig.model_validate({"patch": 2, "width": 24, "depth": 2, "heads": 3, **changes})
    return DiT((4, 8, 8), config, 7).state_dict()


def fits(found: Found, side: int) -> Mapping[str, Tensor]:
    """The weights of a network made from what was found, which have to be those that were read, in their order."""
    side = found.side or side
    shape = (found.channels, side, side)
    with torch.device("meta"):
        net = (
            DiT(shape, found.network, found.num_classes)
            if isinstance(found.network, DiTConfig)
            else MinRF(shape, found.network, found.num_classes)  # type: ignore[arg-type]
        )
    made = net.state_dict()
    assert list(made) == list(found.weights)
    assert [weight.shape for weight in made.values()] == [weight.shape for weight in found.weights.values()]
    return made


# What shapes say -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_published_layouts_are_read(name: str) -> None:
    """Names, shapes and their order are those of the project's own class, and follow from the shapes alone."""
    found = FORMATS[name].read(weights(LAYOUTS[name]), {})
    made = fits(found, 32)
    kept = {key: shape for key, shape in layout(LAYOUTS[name]).items() if not key.startswith("projectors.")}
    assert {key: tuple(weight.shape) for key, weight in made.items()} == kept
    assert list(made) == list(kept)
    if name == "minrf":
        assert found.network == MinRFConfig(patch=2, width=256, depth=10, heads=8, hidden=768)
        assert (found.channels, found.side, found.num_classes) == (3, None, 10)
    else:
        assert found.network == DiTConfig(
            patch=2, width=1152, depth=28, heads=16, learn_sigma=name != "repa", convention=FORMATS[name].convention
        )
        assert (found.channels, found.side, found.num_classes) == (4, 32, 1000)
    assert len(found.left_out) == (6 if name == "repa" else 0)


@pytest.mark.parametrize(
    ("width", "depth", "heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)], ids="SBLX"
)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes(width: int, depth: int, heads: int, patch: int) -> None:
    config = DiTConfig(patch=patch, width=width, depth=depth, heads=heads, convention=SIT.convention)
    with torch.device("meta"):
        net = DiT((4, 32, 32), config, 1000)
    found = SIT.read(net.state_dict(), {})
    assert (found.network, found.side) == (config, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learn_sigma": False},
        {"patch": 1, "mlp_ratio": 8 / 3},
        {"width": 28, "heads": 7, "mlp_ratio": 61 / 28},  # 61 / 28 of 28 is 60.999... to a computer
        {"null_row": False},
        {"qk_norm": True, "width": 32, "heads": 2},
    ],
)
def test_what_is_not_published_is_inferred_or_declared(changes: dict[str, Any]) -> None:
    """Only heads have to be declared, and they not where their norms say them."""
    made = small(**changes)
    said = {name: value for name, value in changes.items() if name == "null_row"}
    if "qk_norm" not in changes:
        with pytest.raises(ValueError, match=r"declare heads$"):
            SIT.read(made, said)
        said["heads"] = changes.get("heads", 3)
    found = SIT.read(made, said)
    wanted = DiTConfig.model_validate(
        {"patch": 2, "width": 24, "depth": 2, "heads": 3, "convention": SIT.convention, **changes}
    )
    mlp_ratio = round(wanted.mlp_ratio * wanted.width) / wanted.width
    assert found.network == wanted.model_copy(update={"mlp_ratio": mlp_ratio})
    assert (found.channels, found.side, found.num_classes) == (4, 8, 7)
    fits(found, 8)


def test_minrf_of_other_sizes() -> None:
    config = MinRFConfig(patch=4, width=128, depth=3, heads=2, hidden=40)
    made = MinRF((1, 8, 12), config, 0).state_dict()
    with pytest.raises(ValueError, match=r"declare heads$"):
        MINRF.read(made, {})
    found = MINRF.read(made, {"heads": 2})
    assert (found.network, found.channels, found.side, found.num_classes) == (config, 1, None, 0)
    fits(found, 8)


@pytest.mark.parametrize(
    ("rows", "said", "wanted"),
    [
        (1001, {}, (1000, True)),
        (11, {}, (10, True)),
        (1000, {}, (1000, False)),
        (10, {}, (10, False)),
        (10, {"null_row": True}, (9, True)),
        (7, {"null_row": False}, (7, False)),
        (1, {}, (0, True)),
        (2, {}, (1, True)),
    ],
)
def test_the_table_of_classes(rows: int, said: dict[str, Any], wanted: tuple[int, bool]) -> None:
    assert classes(rows, said) == wanted


def test_the_last_blocks_of_early_repa() -> None:
    """Counted from the eighth; renamed they are those of a later checkpoint, in the same order."""
    later = weights("repa-sit-xl-2")

    def early(name: str) -> str:
        number = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        return name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 8}.") if number >= 8 else name

    renamed = {early(name): weight for name, weight in later.items()}
    found = REPA.read(renamed, {})
    with pytest.raises(ValueError, match=r"has no decoder_blocks\.3: it is not a whole REPA checkpoint$"):
        REPA.read({name: weight for name, weight in renamed.items() if not name.startswith("decoder_blocks.3.")}, {})
    assert sum(early(name) != name for name in later) == 20 * 10
    assert list(found.weights) == list(REPA.read(later, {}).weights)
    assert found.network.depth == 28  # type: ignore[attr-defined]


# What tells them apart -----------------------------------------------------------------------------------------------


def test_which_formats_know_which_weights() -> None:
    def known(made: Mapping[str, Tensor]) -> set[str]:
        return {name for name, each in FORMATS.items() if each.recognises(made)}

    assert known(weights("sit-xl-2")) == {"sit", "dit"}
    assert known(weights("repa-sit-xl-2")) == {"repa"}
    assert known(weights("minrf-cifar")) == {"minrf"}
    assert known(small(learn_sigma=False)) == {"sit", "dit", "repa"}  # without its heads nothing is REPA's own
    assert known(small(qk_norm=True)) == {"repa"}
    assert known({"net.0.weight": torch.zeros(1)}) == set()
    assert known({}) == set()


# What is refused -----------------------------------------------------------------------------------------------------

NEEDED = {
    "sit": [
        "x_embedder.proj.weight",
        "pos_embed",
        "blocks.0.mlp.fc1.weight",
        "final_layer.linear.weight",
        "y_embedder.embedding_table.weight",
    ],
    "minrf": [
        "init_conv_seq.0.weight",
        "x_embedder.weight",
        "layers.0.feed_forward.w1.weight",
        "final_layer.linear.weight",
        "y_embedder.embedding_table.weight",
    ],
}


@pytest.mark.parametrize(
    ("name", "missing"), [(name, each) for name, needed in NEEDED.items() for each in needed], ids=str
)
def test_a_checkpoint_that_is_not_whole(name: str, missing: str) -> None:
    made = weights(LAYOUTS[name])
    del made[missing]
    title = FORMATS[name].title
    with pytest.raises(ValueError, match=f"^the checkpoint has no {missing}: it is not a whole {title} checkpoint$"):
        FORMATS[name].read(made, {})
    with pytest.raises(ValueError, match=f"^{missing} has shape .*: it is no {title} checkpoint's$"):
        FORMATS[name].read({**made, missing: torch.zeros(3, 0, 2)}, {})


@pytest.mark.parametrize(("name", "blocks"), [("sit", "blocks"), ("minrf", "layers")])
def test_blocks_that_are_missing(name: str, blocks: str) -> None:
    made = weights(LAYOUTS[name])
    gone = {key: weight for key, weight in made.items() if not key.startswith(f"{blocks}.7.")}
    with pytest.raises(ValueError, match=rf"has no {blocks}\.7: it is not a whole"):
        FORMATS[name].read(gone, {})
    none = {key: weight for key, weight in made.items() if not key.startswith(f"{blocks}.")}
    with pytest.raises(ValueError, match=rf"has no {blocks}\.0: it is not a whole"):
        FORMATS[name].read(none, {})
    last = f"{blocks}.{27 if name == 'sit' else 9}."
    cut = {key: weight for key, weight in made.items() if not key.startswith(last)}
    with pytest.raises(ValueError, match="declare heads"):  # no published size
        FORMATS[name].read(cut, {})


def test_weights_that_contradict_each_other() -> None:
    made = weights("sit-xl-2")
    for changed, says in (
        ({"pos_embed": torch.zeros(1, 250, 1152)}, "places in pos_embed number 250, which is no square"),
        ({"final_layer.linear.weight": torch.zeros(48, 1152)}, "says 48 numbers of a patch that has 16"),
        ({"final_layer.linear.weight": torch.zeros(16, 768)}, "1152 wide, the first block 1152 and the last layer 768"),
        ({"x_embedder.proj.weight": torch.zeros(1152, 4, 2, 3)}, "2 x 3, which are no squares"),
    ):
        with pytest.raises(ValueError, match=says):
            SIT.read({**made, **changed}, {})
    minrf = weights("minrf-cifar")
    for changed, says in (
        ({"x_embedder.weight": torch.zeros(256, 3 * 128)}, "pixels of a patch number 3, which is no square"),
        ({"x_embedder.weight": torch.zeros(512, 512)}, "does not follow 128 channels"),
        ({"final_layer.linear.weight": torch.zeros(16, 256)}, r"has shape \[16, 256\], not \[12, 256\]"),
    ):
        with pytest.raises(ValueError, match=says):
            MINRF.read({**minrf, **changed}, {})


def test_what_is_declared_has_to_fit() -> None:
    made = weights("sit-xl-2")
    with pytest.raises(ValueError, match=r"^patch is 2 by the weights, and 4 was declared$"):
        SIT.read(made, {"patch": 4})
    with pytest.raises(ValueError, match=r"^learn_sigma is True by the weights, and False was declared$"):
        SIT.read(made, {"learn_sigma": False})
    with pytest.raises(ValueError, match="paches"):
        SIT.read(made, {"paches": 2})
    with pytest.raises(ValueError, match="multiple of heads 5"):
        SIT.read(made, {"heads": 5})
    assert SIT.read(made, {"patch": 2, "heads": 16}).network == SIT.read(made, {}).network


def test_a_declared_convention() -> None:
    """What it leaves out is as the project has it, where that has a meaning."""
    made = weights("sit-xl-2")

    def read(each: Format, told: object) -> ConventionConfig:
        return each.read(made, {"convention": told}).network.convention

    cosine = ConventionConfig(path="cosine", noise_at=0, velocity_to="data")
    for told in ({"path": "cosine"}, ConventionConfig(path="cosine"), cosine):
        assert read(SIT, told) == cosine
    assert read(SIT, {"noise_at": 1}) == ConventionConfig(velocity_to="data")
    assert read(SIT, {"prediction": "score", "latest": 0.99}) == ConventionConfig(
        prediction="score", noise_at=0, latest=0.99
    )
    assert read(DIT, {"path": "cosine"}) == ConventionConfig(
        path="cosine", prediction="noise", time_scale=999.0, latest=0.999
    )
    assert read(DIT, {"betas": {"end": 0.01}}).path == "betas"


@pytest.mark.parametrize("each", [SIT, DIT], ids=lambda each: each.name)
def test_repa_declared_as_another(each: Format) -> None:
    with pytest.raises(ValueError, match=rf"projectors\.0\.0\.weight, which REPA's have and {each.title}'s have not"):
        each.read(weights("repa-sit-xl-2"), {})


# Their conventions ---------------------------------------------------------------------------------------------------

MEAN, STD = 0.4, 0.6


def sit_says(z: Tensor, t: Tensor) -> Tensor:
    """The mean of ``data - noise`` given ``z = t data + (1 - t) noise``."""
    t = t[:, None]
    off = (z - t * MEAN) / (t**2 * STD**2 + (1 - t) ** 2)
    return MEAN + t * STD**2 * off - (1 - t) * off


def dit_says(z: Tensor, k: Tensor) -> Tensor:
    """The mean of the noise at step ``k`` of 1000, whose variances grow from 1e-4 to 0.02."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    bar = torch.from_numpy(kept)[k.round().long()][:, None]
    return (1 - bar).sqrt() * (z - bar.sqrt() * MEAN) / (bar * STD**2 + 1 - bar)


def repa_says(z: Tensor, t: Tensor) -> Tensor:
    """The mean of ``noise - data`` given ``z = (1 - t) data + t noise``."""
    return -sit_says(z, 1 - t)


def gvp_says(z: Tensor, t: Tensor) -> Tensor:
    """The mean of the derivative of ``z = sin(pi t / 2) data + cos(pi t / 2) noise`` given ``z``."""
    sin, cos = (math.pi / 2 * t[:, None]).sin(), (math.pi / 2 * t[:, None]).cos()
    off = (z - sin * MEAN) / (sin**2 * STD**2 + cos**2)
    return math.pi / 2 * (cos * (MEAN + sin * STD**2 * off) - sin * cos * off)


SAYS = {"sit": sit_says, "dit": dit_says, "repa": repa_says, "minrf": repa_says}


@pytest.mark.parametrize("name", [*FORMATS, "sit on its path GVP"])
def test_an_exact_model_is_read_as_the_exact_velocity(name: str) -> None:
    """Of a Gaussian, by a model that is told time and says its output as the project has them."""
    shares = noise_shares(DIT.convention.betas)  # type: ignore[arg-type]
    gvp = SIT.convention.model_copy(update={"path": "cosine"})
    convention, says = (FORMATS[name].convention, SAYS[name]) if name in FORMATS else (gvp, gvp_says)
    t = shares[::37] if name == "dit" else torch.linspace(0.01, 0.99, 28, dtype=torch.float64)
    x = torch.linspace(-2, 2, 3 * len(t), dtype=torch.float64).reshape(-1, 3)
    field = ConvertedField(lambda z, clock, label: says(z, clock), convention)
    torch.testing.assert_close(field(x, t), GaussianTeacher(MEAN, STD)(x, t), rtol=0, atol=1e-9)


def test_dit_is_told_its_steps() -> None:
    """At the states of its diffusion it is told 0, 1, ..., 999, and shown those states; at ``t = 1`` it is told 999."""
    seen: dict[str, Tensor] = {}

    def model(z: Tensor, clock: Tensor) -> Tensor:
        seen.update(z=z, clock=clock)
        return torch.zeros_like(z)

    shares = noise_shares(DIT.convention.betas)  # type: ignore[arg-type]
    kept = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    x = torch.ones(1000, 1, dtype=torch.float64)
    canonical_velocity(DIT.convention, model, (1 - shares[:, None]) * 3 + shares[:, None] * 5, shares)
    steps = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(seen["clock"], steps, rtol=0, atol=1e-9)
    torch.testing.assert_close(seen["z"][:, 0], 3 * kept.sqrt() + 5 * (1 - kept).sqrt(), rtol=0, atol=1e-12)
    canonical_velocity(DIT.convention, model, x[:2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(seen["clock"], torch.tensor([0.0, 999.0], dtype=torch.float64), rtol=0, atol=1e-9)
    assert math.isclose(float(shares[-1]), 0.9937, abs_tol=1e-4)


def test_guidance_is_each_projects_own() -> None:
    """DiT's and SiT's samplers leave the last channel alone; all count guidance as off at 1."""
    assert {name: each.guided_channels for name, each in FORMATS.items()} == {
        "sit": 3,
        "dit": 3,
        "repa": None,
        "minrf": None,
    }
    assert {each.guidance for each in FORMATS.values()} == {"scale"}
