"""The U-Net against second implementations, its derivative against differences, and what a student needs of it."""

import math

import pytest
import torch
from family import meanflow
from pydantic import ValidationError
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.compiled import compile_objective
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.errors import UsageError
from fewstep.keys import Key
from fewstep.networks.build import build_network, parameter_count
from fewstep.networks.config import SIZES, UNetConfig
from fewstep.networks.dropout import keyed_dropout
from fewstep.networks.embeddings import TimeEmbedding, to_bfloat16
from fewstep.networks.unet import Attention, Block, Down, Up
from fewstep.students.initialise import copy_teacher

CONFIG = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16, dropout=0.25)
SHAPE = (3, 8, 8)
CLASSES = 4


def network(*, two_times: bool = True, seed: int = 0, config: UNetConfig = CONFIG) -> nn.Module:
    """As after training: no weight is zero, and none so large that activations explode."""
    torch.manual_seed(seed)
    net = build_network(config, SHAPE, CLASSES, two_times=two_times)
    rerandomise(net)
    return net


def rerandomise(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if parameter.dim() == 2 or parameter.dim() == 4:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)


def batch(size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *SHAPE, generator=generator, dtype=dtype)
    t = torch.rand(size, generator=generator, dtype=dtype)
    r = t * torch.rand(size, generator=generator, dtype=dtype)
    return x, t, r, torch.arange(size) % (CLASSES + 1)


# ------------------------------------------------------------------------------------------- second implementations


def group_norm(channels: int, groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels).double()
    if weight is not None and bias is not None:
        norm.weight.data, norm.bias.data = weight.detach().flatten(), bias.detach().flatten()
    return norm


@pytest.mark.parametrize(("enter", "leave", "groups"), [(32, 32, (8, 8)), (96, 64, (24, 16)), (64, 160, (16, 32))])
def test_a_block_from_modules_of_torch(enter: int, leave: int, groups: tuple[int, int]) -> None:
    """Groups of four channels, and never more than 32; modulation written out."""
    torch.manual_seed(0)
    block = Block(enter, leave, 20, 0.1).double()
    rerandomise(block)
    h, condition = torch.randn(2, enter, 6, 4, dtype=torch.float64), torch.randn(2, 20, dtype=torch.float64)
    first = group_norm(enter, groups[0], block.norm.weight, block.norm.bias)
    shift, scale = (torch.einsum("be,ce->bc", condition, block.modulation.weight) + block.modulation.bias).split(
        leave, 1
    )
    inner = block.inner(nn.SiLU()(first(h)))
    modulated = group_norm(leave, groups[1])(inner)
    modulated = torch.einsum("bchw,bc->bchw", modulated, 1 + scale) + shift.reshape(2, leave, 1, 1)
    outer = block.outer(nn.SiLU()(modulated))
    wanted = outer + (h if enter == leave else torch.einsum("bchw,oc->bohw", h, block.skip.weight[:, :, 0, 0]))
    if enter != leave:
        wanted = wanted + block.skip.bias[:, None, None]
    torch.testing.assert_close(block(h, condition), wanted, rtol=0, atol=1e-12)


def test_attention_from_modules_of_torch() -> None:
    torch.manual_seed(0)
    attention = Attention(48, 3).double()
    rerandomise(attention)
    reference = nn.MultiheadAttention(48, 3, batch_first=True).double()
    reference.in_proj_weight.data, reference.in_proj_bias.data = attention.enter.weight.data, attention.enter.bias.data
    reference.out_proj.weight.data, reference.out_proj.bias.data = (
        attention.leave.weight.data,
        attention.leave.bias.data,
    )
    h = torch.randn(2, 48, 3, 5, dtype=torch.float64)
    tokens = group_norm(48, 12, attention.norm.weight, attention.norm.bias)(h).reshape(2, 48, 15).permute(0, 2, 1)
    wanted = h + reference(tokens, tokens, tokens)[0].permute(0, 2, 1).reshape(2, 48, 3, 5)
    torch.testing.assert_close(attention(h), wanted, rtol=0, atol=1e-12)


def test_resolutions_by_hand() -> None:
    """Every second pixel of a plain convolution; every pixel four times before one."""
    torch.manual_seed(0)
    down, up, h = Down(4).double(), Up(4).double(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    plain = nn.functional.conv2d(h, down.conv.weight, down.conv.bias, padding=1)
    torch.testing.assert_close(down(h), plain[:, :, ::2, ::2], rtol=0, atol=1e-12)
    repeated = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    plain = nn.functional.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(h), plain, rtol=0, atol=1e-12)


def test_the_whole_from_its_parts() -> None:
    """Two levels of one stage, written out: each stage on the way up takes the last output not yet taken."""
    net = network().double()
    x, t, r, label = batch(dtype=torch.float64)
    condition = nn.functional.silu(net.embed_t(t) + net.embed_gap(t - r) + net.embed_label(label))
    h0 = net.enter(x)
    h1 = net.down[0](h0, condition)
    h2 = net.down[1].conv(h1)
    h3 = net.down[2](h2, condition)
    h = net.middle[1](net.middle[0](h3, condition), condition)
    for stage, skip in zip(net.up, (h3, h2, h1, h0), strict=True):
        h = stage(torch.cat((h, skip), dim=1), condition)
    norm = group_norm(32, 8, net.norm.weight, net.norm.bias)
    torch.testing.assert_close(net(x, t, r, label), net.leave(nn.SiLU()(norm(h))), rtol=0, atol=1e-12)
    assert [h1.shape[-1], h2.shape[-1], h3.shape[-1], h.shape[-1]] == [8, 4, 4, 8]
    with_attention = [isinstance(stage.attention, Attention) for stage in (*net.middle, *net.up)]
    assert with_attention == [True, False, True, True, False, False]
    assert not isinstance(net.down[0].attention, Attention)
    assert net.down[2].attention.heads == 4


# ------------------------------------------------------------------------------------------------------- derivative


@pytest.mark.parametrize("dropped", [False, True])
def test_the_derivative_against_differences(dropped: bool) -> None:
    """In float64, with two central differences extrapolated to fourth order. Under a key, both see the same masks."""
    net = network().double()
    x, t, r, label = batch(dtype=torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    key, none = Key(0), torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        plain = net(x, t, r, label)
    with keyed_dropout(net if dropped else nn.Identity(), key, torch.arange(len(x)) if dropped else none):
        assert torch.equal(net(x, t, r, label), plain) != dropped
        found = forward_derivative(net, x, v, t, r, label)
        coarse, fine = (central_difference(step)(net, x, v, t, r, label) for step in (1e-3, 5e-4))
    wanted = (4 * fine - coarse) / 3
    assert float((found - wanted).norm() / wanted.norm()) < 1e-7
    assert found.norm() > 0.1 * v.norm()


def test_images_in_channels_last() -> None:
    """The same output and derivative, for such images and for weights laid out so."""
    net = network().double()
    x, t, r, label = batch(dtype=torch.float64)
    v = torch.randn_like(x)
    wanted, derivative = net(x, t, r, label), forward_derivative(net, x, v, t, r, label)
    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for other in (net, network().double().to(memory_format=torch.channels_last)):
        torch.testing.assert_close(other(last, t, r, label), wanted, rtol=0, atol=1e-12)
        found = forward_derivative(other, last, v, t, r, label)
        torch.testing.assert_close(found, derivative, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_compiled_network_and_derivative() -> None:
    """One graph each, checked against eager mode; masks change from step to step without another."""
    torch._dynamo.reset()
    net, eager = network(), network()
    objective = meanflow(net)
    x, t, r, label = batch()
    v, index = torch.randn_like(x), torch.arange(len(x))
    torch._dynamo.utils.counters.clear()
    with keyed_dropout(net, Key(0), index):
        compile_objective(objective, Batch(x, label, index), backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    outputs = []
    for step in (1, 2):
        with keyed_dropout(net, Key(0, step), index), keyed_dropout(eager, Key(0, step), index):
            outputs.append(net(x, t, r, label))
            torch.testing.assert_close(outputs[-1], eager(x, t, r, label))
            assert objective.derivative is not None
            found = objective.derivative(net, x, v, t, r, label)
            torch.testing.assert_close(found, forward_derivative(eager, x, v, t, r, label))
    assert not torch.equal(*outputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


# ---------------------------------------------------------------------------------------------- as teacher and student


def test_a_copied_student_is_its_teacher_to_the_bit() -> None:
    teacher, student = network(two_times=False), build_network(CONFIG, SHAPE, CLASSES, two_times=True)
    copy_teacher(student, teacher)
    x, t, r, label = batch()
    for labels in (label, None):
        wanted = teacher(x, t, t, labels)
        assert torch.equal(student(x, t, r, labels), wanted)
        assert torch.equal(student(x, t, 0 * t, labels), wanted)
    assert wanted.abs().min() > 0


def test_what_enters() -> None:
    """Time, gap and label each tell; no label is the null label; without classes labels are ignored."""
    net = network()
    x, t, r, label = batch()
    u = net(x, t, r, label)
    null = net(x, t, r, torch.full_like(label, CLASSES))
    assert torch.equal(net(x, t, r, None), null)
    assert torch.equal(u[4], null[4])
    for other in (net(x, t / 2, r, label), net(x, t, r / 2, label), net(x, t, r, (label + 1) % CLASSES)):
        assert ((u - other).flatten(1).abs().amax(dim=1) > 1e-4).all()
    unconditional = build_network(CONFIG, SHAPE, 0, two_times=True)
    rerandomise(unconditional)
    assert torch.equal(unconditional(x, t, r, label), unconditional(x, t, r))


def test_it_starts_at_zero() -> None:
    """And every block and attention as if it were not there."""
    torch.manual_seed(0)
    net = build_network(CONFIG, SHAPE, CLASSES, two_times=True)
    assert not net(*batch()).any()
    h, condition = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert torch.equal(net.down[0](h, condition), h)
    wide = torch.randn(2, 64, 4, 4)
    assert torch.equal(net.middle[0](wide, condition), wide)


def test_gradients_reach_every_parameter() -> None:
    net = network()
    net(*batch()).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@torch.no_grad()
def test_precision() -> None:
    """In bfloat16 but for the embeddings of time, near float32; the output has the precision of the image."""
    net = network()
    x, t, r, label = batch()
    wanted = net(x, t, r, label)
    half = to_bfloat16(network())
    kept = {id(p) for module in half.modules() if isinstance(module, TimeEmbedding) for p in module.parameters()}
    assert all((p.dtype == torch.float32) == (id(p) in kept) for p in half.parameters())
    found = half(x, t, r, label)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 3e-2
    assert half(x.to(torch.bfloat16), t, r, label).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert float((net(x, t, r, label) - wanted).norm() / wanted.norm()) < 3e-2


def test_dropout_belongs_to_the_key() -> None:
    """Sample ``i`` comes out the same in any batch; another step, and no key at all, give something else."""
    net = network().double()
    x, t, r, label = batch(dtype=torch.float64)
    index = torch.arange(len(x))

    def dropped(rows: Tensor, step: int = 3) -> Tensor:
        with keyed_dropout(net, Key(0, step), index[rows]):
            return net(x[rows], t[rows], r[rows], label[rows])

    whole, plain = dropped(index), net(x, t, r, label)
    part = torch.tensor([4, 1])
    torch.testing.assert_close(dropped(part), whole[part], rtol=0, atol=1e-12)
    for other in (plain, dropped(index, step=4)):
        assert ((whole - other).flatten(1).abs().amax(dim=1) > 1e-2).all()
    net.eval()
    assert torch.equal(dropped(index), plain)


def test_lists_to_shard_are_flat() -> None:
    """What shards an element of a list must not have sharded it with another list before."""
    lists = [module for module in network().modules() if isinstance(module, nn.ModuleList)]
    assert len(lists) == 3
    assert not [inner for outer in lists for inner in outer.modules() if inner is not outer and inner in lists]


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("size", "shape", "classes", "two_times", "count"),
    [
        ("unet-tiny", (1, 8, 8), 10, True, 477_729),
        ("unet-mini", (3, 32, 32), 10, True, 4_137_443),
        ("unet-small", (3, 32, 32), 10, True, 21_693_027),
        ("unet-base", (3, 32, 32), 10, True, 58_257_923),
        # torchcfm's 35 746 307, and from that: 4992 channels of blocks get a scale from 512 numbers and a bias, and
        # lose weight and bias of a norm; the first layer over the time has 32 sinusoids and not 128.
        ("unet-cifar", (3, 32, 32), 0, False, 35_746_307 + 4992 * (513 - 2) - 96 * 512),
    ],
)
def test_sizes(size: str, shape: tuple[int, ...], classes: int, two_times: bool, count: int) -> None:
    with torch.device("meta"):
        net = build_network(SIZES[size], shape, classes, two_times=two_times)
    assert parameter_count(net) == count


def test_images_that_are_not_square() -> None:
    net = build_network(CONFIG.model_copy(update={"attention": (8,)}), (1, 4, 8), 0, two_times=True)
    x, t, r, _ = batch()
    assert net(x[:, :1, :4], t, r).shape == (6, 1, 4, 8)
    assert isinstance(net.down[0].attention, Attention)


def test_attention_where_no_level_has_that_side() -> None:
    """Only the middle has it then: a named size takes images of any side that it can halve."""
    net = build_network(CONFIG, (1, 32, 32), 0, two_times=True)
    assert not any(isinstance(stage.attention, Attention) for stage in (net.down[0], *net.up))
    assert isinstance(net.middle[0].attention, Attention)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2,), r"a network of kind unet takes images, not samples of shape \[2\]"),
        ((1, 8, 7), r"with 2 multipliers takes images with sides that are multiples of 2, not 8 x 7"),
        ((1, 9, 8), r"multiples of 2, not 9 x 8"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(CONFIG, shape, 0, two_times=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"head_channels": 48}, "channels 128 have to be a multiple of head_channels 48"),
        ({"multipliers": ()}, "at least 1 item"),
        ({"multipliers": (1, 0)}, "greater than or equal to 1"),
        ({"dropout": 0.95}, "less than or equal to 0.9"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig.model_validate(changes)
