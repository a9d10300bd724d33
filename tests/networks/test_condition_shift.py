"""Condition shifts: the shifted method itself, its start, its flow map, its gradients."""

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.flow_matching import FlowMatching
from fewstep.flow import LINEAR
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.condition_shift import ConditionShift
from fewstep.networks.config import MLPConfig, NetworkConfig
from fewstep.students.initialise import copy_teacher
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.times import uniform

SHAPE, CLASSES, NULL = (1, 2, 3), 4, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}
BARE, SHIFTED = MLPConfig(width=16, depth=2), MLPConfig(width=16, depth=2, condition_shift=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(config: NetworkConfig, *, two_times: bool = True, classes: int = CLASSES) -> nn.Module:
    """In float64, its zero layers filled; the shifts are left at zero."""
    torch.manual_seed(0)
    net = build_network(config, SHAPE, classes, two_times=two_times).double()
    for name, parameter in net.named_parameters():
        if not parameter.any() and not name.endswith("_shift"):
            nn.init.normal_(parameter, std=0.3)
    return net


def shifted(net: nn.Module) -> nn.Module:
    """The same with its shifts somewhere."""
    with torch.no_grad():
        net.data_shift.copy_(normal(CLASSES + 1, *SHAPE, seed=7))
        net.noise_shift.copy_(normal(CLASSES + 1, *SHAPE, seed=8))
    return net


def arguments(count: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = torch.linspace(0.1, 1, count, dtype=torch.float64)
    return (
        normal(count, *SHAPE, seed=1),
        t,
        t * torch.linspace(0, 1, count, dtype=torch.float64),
        torch.arange(count) % 5,
    )


def test_loss_is_that_of_shifted_source_and_target() -> None:
    """``|| net(z_t) - (e' - x') ||^2`` on the path between ``x' = x + mu_x(y)`` and ``e' = e + mu_e(y)``, as the paper
    trains, with its gradient in network and shifts; labels dropped to null use the null label's shifts."""
    net = shifted(network(SHIFTED, two_times=False))
    index = torch.arange(20)
    batch = Batch(normal(20, *SHAPE, seed=2), index % CLASSES, index)
    key, dyadic = Key(1, 3), lambda u: (u * 63).ceil() / 64  # times that lose nothing in float32
    noise = lambda batch, key: key.normal("noise", batch.index, SHAPE).double()  # noqa: E731
    objective = FlowMatching(net, times=dyadic, label_dropout=0.4, null_label=NULL, noise=noise)
    loss = objective(batch, key).per_sample_B

    label = batch.label.masked_fill(key.uniform("label_dropout", index) < 0.4, NULL)
    assert 0 < int((label == NULL).sum()) < 20
    t = dyadic(key.uniform("time", index))
    x, e = batch.x + net.data_shift[label], noise(batch, key) + net.noise_shift[label]
    z_t = (1 - t).reshape(-1, 1, 1, 1) * x + t.reshape(-1, 1, 1, 1) * e
    wanted = (net.net(z_t, t.float(), t.float(), label) - (e - x)).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(loss, wanted, **EXACT)
    parameters = list(net.parameters())
    ours = torch.autograd.grad(loss.mean(), parameters)
    theirs = torch.autograd.grad(wanted.mean(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_starts_as_the_bare_network(classes: int) -> None:
    """To the bit, of the same seed, with and without labels."""
    bare, wrapped = network(BARE, classes=classes), network(SHIFTED, classes=classes)
    assert isinstance(wrapped, ConditionShift)
    assert not wrapped.data_shift.any()
    assert not wrapped.noise_shift.any()
    assert wrapped.data_shift.shape == wrapped.noise_shift.shape == (classes + 1, *SHAPE)
    x, t, r, label = arguments()
    assert torch.equal(wrapped(x, t, r, None), bare(x, t, r, None))
    if classes:
        assert torch.equal(wrapped(x, t, r, label), bare(x, t, r, label))
        assert not torch.equal(shifted(wrapped)(x, t, r, label), bare(x, t, r, label))


def test_no_label_is_the_null_label() -> None:
    net = shifted(network(SHIFTED))
    x, t, r, label = arguments()
    assert torch.equal(net(x, t, r, None), net(x, t, r, torch.full_like(label, NULL)))
    assert not torch.equal(net(x, t, r, None), net(x, t, r, torch.zeros_like(label)))


def test_two_times_start_as_their_teacher() -> None:
    """A student that has copied a one-time teacher, shifts included, returns its velocity for every r, to the bit."""
    teacher = shifted(network(SHIFTED, two_times=False))
    torch.manual_seed(5)
    student = build_network(SHIFTED, SHAPE, CLASSES, two_times=True).double()
    copy_teacher(student, teacher)
    x, t, r, label = arguments()
    for labels in (label, None):
        assert torch.equal(student(x, t, r, labels), teacher(x, t, t, labels))
    with pytest.raises(ValueError, match="data_shift"):
        copy_teacher(build_network(BARE, SHAPE, CLASSES, two_times=True).double(), teacher)


class ExactAverage(nn.Module):
    """The average velocity of Gaussian data: of N(m_y, .6^2) for class y."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means = means

    def forward(
        self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None, guidance_B3: Tensor | None = None
    ) -> Tensor:
        # A Gaussian is moved to the origin, where it has the same flow, and back.
        mean = self.means[label_B]
        offset = (1 - t_B).reshape(-1, 1, 1, 1) * mean
        return GaussianTeacher(0.0, 0.6).average_velocity(x - offset, t_B, r_B) - mean


def test_jumps_commute_with_the_shift() -> None:
    """With an exact average velocity inside, the wrapped one jumps from a state to a state as the inner one does from
    the shifted state to the shifted state, ``z_r = x_r + (1 - r) mu_x + r mu_e``. And if the inside is the exact one of
    data moved by ``mu_x``, under noise that is not moved, the outside is the exact one of the data themselves."""
    x, t, r, _ = arguments()
    label = torch.arange(10) % CLASSES
    means = normal(CLASSES + 1, *SHAPE, seed=3)
    net = shifted(ConditionShift(ExactAverage(means), SHAPE, CLASSES).double())
    mu_x, mu_e = net.data_shift[label], net.noise_shift[label]

    def at(time: Tensor) -> Tensor:
        return LINEAR.sample(mu_x, mu_e, time).x_t

    inner, outer = AverageVelocityMap(net.net), AverageVelocityMap(net)
    torch.testing.assert_close(outer(x, t, r, label) + at(r), inner(x + at(t), t, r, label), **EXACT)

    with torch.no_grad():
        net.noise_shift.zero_()
    net.net.means = means + net.data_shift.detach()
    exact = AverageVelocityMap(ExactAverage(means))
    torch.testing.assert_close(outer(x, t, r, label), exact(x, t, r, label), **EXACT)
    assert not torch.allclose(inner(x, t, r, label), exact(x, t, r, label), atol=0.1)


def test_gradients_reach_both_tables() -> None:
    """In the rows of the labels that occur, from the first step of a network whose last layer starts at zero: the shift
    that is taken off the velocity comes after it."""
    torch.manual_seed(0)
    net = build_network(SHIFTED, SHAPE, CLASSES, two_times=False)
    batch = Batch(normal(12, *SHAPE).float(), torch.arange(12) % 2, torch.arange(12))
    objective = FlowMatching(net, times=uniform, label_dropout=0.0, null_label=NULL)
    objective(batch, Key(0)).per_sample_B.mean().backward()
    for table in (net.data_shift, net.noise_shift):
        assert table.grad[:2].flatten(1).any(dim=1).all()
        assert not table.grad[2:].any()
    torch.testing.assert_close(net.data_shift.grad, -net.noise_shift.grad, rtol=1e-5, atol=1e-7)


def test_precision_is_that_of_the_state() -> None:
    """A state in bfloat16 stays so, and the time is not rounded to it on its way into the network."""
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(
            self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None, guidance_B3: Tensor | None = None
        ) -> Tensor:
            seen.append(t_B)
            return x

    net = ConditionShift(Recorder(), SHAPE, CLASSES)
    t = torch.full((3,), 0.123456789)
    assert net(normal(3, *SHAPE).bfloat16(), t, t, None).dtype == torch.bfloat16
    assert torch.equal(seen[0], t)
