"""What networks of every kind are told beside their state: two times in either way, labels, guidance."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import UsageError
from fewstep.networks.build import build_network, network_from_card
from fewstep.networks.condition import ConditionedNetwork, early_blocks
from fewstep.networks.condition_shift import ConditionShift
from fewstep.networks.config import FloTConfig, MLPConfig, NetworkConfig, UNetConfig
from fewstep.networks.embeddings import GuidanceEmbedding, TimeEmbedding, sinusoidal, to_bfloat16
from fewstep.networks.flot import FloT
from fewstep.networks.unet import Stage, UNet
from fewstep.students.initialise import copy_teacher

SHAPE, CLASSES = (3, 4, 6), 4
CONFIGS: dict[str, NetworkConfig] = {
    "mlp": MLPConfig(width=16, depth=3),
    "flot": FloTConfig(width=24, depth=3, heads=3),
    "unet": UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(3,), head_channels=32),
    "shifted mlp": MLPConfig(width=16, depth=3, condition_shift=True),
    "shifted flot": FloTConfig(width=24, depth=3, heads=3, condition_shift=True),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
BARE = ("mlp", "flot", "unet")


def network(kind: str, *, random: bool = True, classes: int = CLASSES, two_times: bool = True, **how: Any) -> nn.Module:
    """``random`` gives every weight a value, those that start at zero included, as after training."""
    torch.manual_seed(0)
    net = build_network(CONFIGS[kind], SHAPE, classes, two_times=two_times, **how)
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters() if random else ():
        scale = 1 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return net


def batch(size: int = 10, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, times, earlier times (one equal, one zero), labels with the null label."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *SHAPE, generator=generator, dtype=dtype)
    t = torch.rand(size, generator=generator, dtype=dtype)
    r = t * torch.rand(size, generator=generator, dtype=dtype)
    r[0], r[1] = t[0], 0
    return x, t, r, torch.arange(size) % (CLASSES + 1)


def guidances(size: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales from 1/2 to 8, windows of every length."""
    generator = torch.Generator().manual_seed(2)
    window = torch.rand(size, 2, generator=generator, dtype=dtype).sort(dim=1).values
    return torch.cat((torch.logspace(-1, 3, size, 2, dtype=dtype)[:, None], window), dim=1)


def body(net: nn.Module) -> ConditionedNetwork:
    inner = net.net if isinstance(net, ConditionShift) else net
    assert isinstance(inner, ConditionedNetwork)
    return inner


def blocks(net: nn.Module) -> list[nn.Module]:
    """What is modulated, in the order in which it acts; the modulation behind all of FloT's blocks is the last."""
    inner = body(net)
    if isinstance(inner, UNet):
        return [stage for stage in (*inner.down, *inner.middle, *inner.up) if isinstance(stage, Stage)]
    return [*inner.blocks]


def ends(net: nn.Module) -> list[nn.Module]:
    inner = body(net)
    return [inner.modulation] if isinstance(inner, FloT) else []


def modulations(net: nn.Module) -> list[nn.Module]:
    inner = [block.block if isinstance(block, Stage) else block for block in blocks(net)]
    return [block.modulation for block in inner] + ends(net)


@contextmanager
def recorded(modules: list[nn.Module], *, outputs: bool) -> Iterator[list[Tensor]]:
    """The first input, or the output, of each module as it is called."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output if outputs else inputs[0])

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# One place -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize("two_times", [False, True])
def test_embeddings_are_drawn_first_and_in_order(kind: str, two_times: bool) -> None:
    """Their names and their order are the weights of every seed and of every model there is."""
    net = network(kind, random=False, two_times=two_times)
    width = net.embed_t.inner.out_features
    torch.manual_seed(0)
    wanted = {"embed_t": TimeEmbedding(width, max_frequency=3.0, zero=False)}
    if two_times:
        wanted["embed_gap"] = TimeEmbedding(width, max_frequency=3.0, zero=True)
    wanted["embed_label"] = nn.Embedding(CLASSES + 1, width)
    names = [f"{name}.{part}" for name, module in wanted.items() for part in module.state_dict()]
    found = {name: value for name, value in net.state_dict().items() if name.startswith("embed_")}
    assert list(found) == names
    for name, module in wanted.items():
        for part, value in module.state_dict().items():
            assert torch.equal(found[f"{name}.{part}"], value)


@kinds
@pytest.mark.parametrize("classes", [0, CLASSES])
def test_each_block_sees_what_it_should(kind: str, classes: int) -> None:
    """By gap all see ``t`` and ``t - r``; by layers the early ones see ``t``, the others and the end ``r``."""
    x, t, r, label = batch()
    labels, w = label if classes else None, guidances()
    for split in (None, 0.4):
        net = network(kind, classes=classes, split=split, guidance=True)
        inner = body(net)
        with recorded(modulations(net), outputs=False) as seen:
            net(x, t, r, labels, w)
        rest = inner.embed_guidance(w) + (inner.embed_label(label) if classes else 0)
        silu = nn.functional.silu
        count = len(blocks(net))
        assert count == (8 if kind == "unet" else 3)
        early, late = silu(inner.embed_t(t) + rest), silu(inner.embed_t(r) + rest)
        if split is None:
            early = late = silu(inner.embed_t(t) + inner.embed_gap(t - r) + rest)
        number = {3: 1, 8: 3}[count]  # 0.4 of them: 1.2 and 3.2
        wanted = [early] * number + [late] * (count - number + len(ends(net)))
        assert len(seen) == len(wanted)
        for found, expected in zip(seen, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (early - late).abs().max() > 0.1 or split is None


# The second time by layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "count", "early"),
    [(0.7, 28, 20), (0.7, 10, 7), (0.7, 3, 2), (0.7, 2, 1), (0.5, 8, 4), (0.01, 5, 1), (0.99, 5, 4), (0.3, 22, 7)],
)
def test_share_of_early_blocks(split: float, count: int, early: int) -> None:
    """The first is the paper's; each time has a block at least."""
    assert early_blocks(split, count) == early


def test_splits_that_cannot_be() -> None:
    for config in (MLPConfig(width=16, depth=1), FloTConfig(width=24, depth=1, heads=3)):
        build_network(config, SHAPE, 0, two_times=True)
        with pytest.raises(UsageError, match="one block"):
            build_network(config, SHAPE, 0, two_times=True, split=0.7)
    with pytest.raises(ValueError, match="one time"):
        network("mlp", two_times=False, split=0.7)
    for split in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            network("mlp", split=split)


@kinds
@pytest.mark.parametrize("split", [0.3, 0.7])
def test_a_split_student_is_its_teacher_on_the_diagonal(kind: str, split: float) -> None:
    """To the bit, of the same parameters and no other; ``r`` acts from the first step."""
    teacher = network(kind, two_times=False)
    torch.manual_seed(9)
    student = build_network(CONFIGS[kind], SHAPE, CLASSES, two_times=True, split=split)
    assert list(student.state_dict()) == list(teacher.state_dict())
    copy_teacher(student, teacher)
    x, t, r, label = batch()
    for labels in (label, None):
        wanted = teacher(x, t, t, labels)
        assert torch.equal(student(x, t, t, labels), wanted)
        moved = (student(x, t, r, labels) - wanted).flatten(1).abs().amax(dim=1)
        assert moved[0] == 0  # r = t in this row
        assert (moved[1:] > 1e-5).all()
    assert wanted.abs().min() > 0


@kinds
def test_the_second_time_acts_in_late_layers_alone(kind: str) -> None:
    """The derivative of every block's output in ``r``: exactly zero before the split, and not after."""
    net = network(kind, split=0.5).double()
    x, t, r, label = batch(dtype=torch.float64)

    def of_times(t: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        with recorded(blocks(net), outputs=True) as seen:
            out = net(x, t, r, label)
        return (*seen, out)

    one, none = torch.ones_like(t), torch.zeros_like(t)
    with sdpa_kernel(SDPBackend.MATH):
        in_t, in_r = (torch.func.jvp(of_times, (t, r), along)[1] for along in ((one, none), (none, one)))
    early = body(net).early
    assert early == (4 if kind == "unet" else 2)
    assert not any(tangent.any() for tangent in in_r[:early])
    assert all((tangent.flatten(1).norm(dim=1) > 1e-4).all() for tangent in (*in_r[early:], *in_t))


# Guidance ------------------------------------------------------------------------------------------------------------


def test_the_embedding_of_guidance_by_hand() -> None:
    """Sinusoids of ``1 / w``, ``low`` and ``high``, two layers with a SiLU between."""
    torch.manual_seed(0)
    embed = GuidanceEmbedding(6, max_frequency=3.0, features=4)
    assert not embed(guidances()).any()
    nn.init.normal_(embed.outer.weight)
    nn.init.normal_(embed.outer.bias)
    found = embed(torch.tensor([[4.0, 0.125, 0.75]]))[0]
    angles = [frequency * number for number in (0.25, 0.125, 0.75) for frequency in (1.0, 3.0)]
    features = [f(angle) for n in range(3) for f in (math.cos, math.sin) for angle in angles[2 * n : 2 * n + 2]]
    inner = [sum(w * f for w, f in zip(row, features, strict=True)) for row in embed.inner.weight.tolist()]
    hidden = torch.tensor([h + b for h, b in zip(inner, embed.inner.bias.tolist(), strict=True)])
    hidden = hidden / (1 + torch.exp(-hidden))
    torch.testing.assert_close(found, embed.outer.weight @ hidden + embed.outer.bias)


@kinds
@pytest.mark.parametrize("split", [None, 0.5])
def test_a_student_with_guidance_is_its_teacher(kind: str, split: float | None) -> None:
    """To the bit, for every scale, window and label, and without guidance; for every ``r`` where the gap tells it."""
    teacher = network(kind, two_times=False)
    torch.manual_seed(9)
    student = build_network(CONFIGS[kind], SHAPE, CLASSES, two_times=True, split=split, guidance=True)
    copy_teacher(student, teacher)
    x, t, r, label = batch()
    for labels in (label, None):
        wanted = teacher(x, t, t, labels)
        for guidance in (guidances(), guidances().flip(0), None):
            for earlier in (t,) if split else (t, r, 0 * t):
                assert torch.equal(student(x, t, earlier, labels, guidance), wanted)
    assert wanted.abs().min() > 0


@kinds
def test_guidance_tells(kind: str) -> None:
    """Scale, lower and higher time, each by itself and for its own sample; none is unguided at all times."""
    net = network(kind, guidance=True)
    x, t, r, label = batch()
    w = guidances()
    u = net(x, t, r, label, w)
    for number in range(3):
        other = w.clone()
        other[:5, number] = 0.9 * other[:5, number] + 0.1
        moved = (net(x, t, r, label, other) - u).flatten(1).abs().amax(dim=1)
        assert (moved[:5] > 1e-5).all()
        assert (moved[5:] < 1e-6).all()
    unguided = net(x, t, r, label)
    assert torch.equal(net(x, t, r, label, torch.tensor([1.0, 0.0, 1.0]).expand(10, 3)), unguided)
    assert not torch.allclose(u, unguided, atol=1e-3)


@kinds
def test_guidance_for_a_network_without_it(kind: str) -> None:
    net = network(kind)
    x, t, r, label = batch()
    with pytest.raises(ValueError, match="no input for it"):
        net(x, t, r, label, guidances())


@kinds
def test_the_first_step_teaches_guidance(kind: str) -> None:
    """The zero layer of a copied student has a gradient: after one step the scale tells."""
    student = network(kind, random=False, guidance=True)
    copy_teacher(student, network(kind, two_times=False))
    x, t, r, label = batch()
    student(x, t, r, label, guidances()).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    low, high = (student(x, t, r, label, torch.tensor([[w, 0.0, 1.0]]).expand(10, 3)) for w in (1.0, 4.0))
    assert ((low - high).flatten(1).abs().amax(dim=1) > 0).all()


# Derivatives and precision -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("split", [None, 0.5])
def test_derivatives_in_every_number_against_differences(kind: str, split: float | None) -> None:
    """Forward mode in ``t``, ``r``, scale, lower and higher time, one at a time, in float64."""
    net = network(kind, split=split, guidance=True).double()
    x, t, r, label = batch(dtype=torch.float64)
    point = torch.cat((t[:, None], r[:, None], guidances(dtype=torch.float64)), dim=1)

    def u(point: Tensor) -> Tensor:
        return net(x, point[:, 0], point[:, 1], label, point[:, 2:])

    for number in range(5):
        along = torch.zeros_like(point)
        along[:, number] = 1
        with sdpa_kernel(SDPBackend.MATH):
            exact = torch.func.jvp(u, (point,), (along,))[1]
        h = 1e-5
        near = (u(point + h * along) - u(point - h * along)) / (2 * h)
        assert (exact - near).norm() < 1e-7 * near.norm()
        assert near.norm() > 1e-3


@kinds
def test_the_derivative_along_the_path_of_a_split_network(kind: str) -> None:
    """The objectives' own two ways, unguided."""
    net = network(kind, split=0.5, guidance=True).double()
    x, t, r, label = batch(dtype=torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact, near = (way(net, x, v, t, r, label) for way in (forward_derivative, central_difference(1e-5)))
    assert (exact - near).norm() < 1e-7 * near.norm()


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_guidance_and_times_stay_in_float32(kind: str, how: str) -> None:
    """What bfloat16 would round to one number is told apart; the rest of the network is in bfloat16."""
    net = network(kind, split=0.5, guidance=True)
    x, t, r, label = batch()
    wanted = net(x, t, r, label, guidances())
    if how == "weights":
        to_bfloat16(net)
        assert net.embed_guidance.outer.weight.dtype == net.embed_t.outer.weight.dtype == torch.float32
        assert net.embed_label.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = net(x, t, r, label, guidances())
        near = net.embed_guidance(torch.tensor([[4.0, 0.5, 0.75], [4.001, 0.5, 0.75], [4.0, 0.5, 0.7501]]))
    assert found.dtype == near.dtype == torch.float32
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 3e-2
    assert ((near[0] != near[1]) & (near[0] != near[2])).any()
    low = 1 / torch.tensor([4.0, 4.001])
    assert torch.equal(*low.bfloat16())
    assert not torch.equal(*sinusoidal(low, 8, 3.0))


@kinds
def test_gradients_reach_every_weight(kind: str) -> None:
    net = network(kind, split=0.5, guidance=True)
    x, t, r, label = batch()
    net(x, t, r, label, guidances()).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


# Cards ---------------------------------------------------------------------------------------------------------------


def test_a_card_gives_the_network_back() -> None:
    """And one from before there were splits and guidance still means the gap."""
    data = {"shape": list(SHAPE), "num_classes": CLASSES}
    card = {"network": CONFIGS["mlp"].model_dump(mode="json"), "two_times": True, "data": data}
    for extra, how in (
        ({}, {}),
        ({"split": None, "guidance_input": False}, {}),
        ({"split": 0.3}, {"split": 0.3}),
        ({"guidance_input": True}, {"guidance": True}),
    ):
        found = network_from_card({**card, **extra})[1]
        wanted = network("mlp", **how)
        found.load_state_dict(wanted.state_dict())
        x, t, r, label = batch()
        assert torch.equal(found(x, t, r, label), wanted(x, t, r, label))
