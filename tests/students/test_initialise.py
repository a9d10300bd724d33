"""A student that starts as its teacher, to the bit, and student networks as flow maps."""

import pytest
import torch
from torch import Tensor, nn

from fewstep.flow import FlowMap, TimeDomain
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.students.initialise import GUIDANCE, SECOND_TIME, copy_teacher
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap, GuidanceInput, consistency_velocity

CONFIG = MLPConfig(width=32, depth=2)


def trained(*, two_times: bool = False, seed: int = 0, config: MLPConfig = CONFIG, classes: int = 4) -> nn.Module:
    """A network with weights as after training: none is zero."""
    net = build_network(config, (2, 3), classes, two_times=two_times)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def fresh(*, split: float | None = None, guidance: bool = False) -> nn.Module:
    torch.manual_seed(5)
    return build_network(CONFIG, (2, 3), 4, two_times=True, split=split, guidance=guidance)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, times, earlier times (the diagonal, r = 0 and between) and labels with the null label."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 2, 3, generator=generator)
    t = torch.rand(60, generator=generator)
    r = t * torch.rand(60, generator=generator)
    r[:20], r[20:30] = t[:20], 0
    return x, t, r, torch.arange(60) % 5


def test_a_copied_student_is_its_teacher_to_the_bit() -> None:
    """``student(x, t, r) == teacher(x, t)`` on the diagonal and off it, with and without labels."""
    teacher, student = trained(), fresh()
    x, t, r, label = batch()
    assert not torch.equal(student(x, t, r, label), teacher(x, t, t, label))
    copy_teacher(student, teacher)
    for labels in (label, None):
        wanted = teacher(x, t, t, labels)
        assert torch.equal(student(x, t, t, labels), wanted)
        assert torch.equal(student(x, t, r, labels), wanted)
    assert wanted.abs().min() > 0


def test_one_optimiser_step_uses_the_second_time() -> None:
    """The zero layer has a gradient: after one step the student tells r from t, and the teacher is as before."""
    teacher, student = trained(), fresh()
    x, t, r, label = batch()
    copy_teacher(student, teacher)
    before = teacher(x, t, t, label)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    student(x, t, r, label).square().mean().backward()
    optimizer.step()
    jumps = r < t
    u, v = student(x, t, r, label), student(x, t, t, label)
    assert ((u - v).flatten(1).abs().amax(dim=1)[jumps] > 0).all()
    assert not torch.equal(v, before)
    assert torch.equal(teacher(x, t, t, label), before)


def test_a_two_time_teacher_is_copied_whole() -> None:
    """The previous stage of a progressive run, second-time embedding included."""
    teacher, student = trained(two_times=True), fresh()
    copy_teacher(student, teacher)
    x, t, r, label = batch()
    assert torch.equal(student(x, t, r, label), teacher(x, t, r, label))
    assert not torch.equal(student(x, t, r, label), student(x, t, t, label))


@pytest.mark.parametrize("split", [None, 0.5])
def test_a_student_with_guidance_is_copied_whole(split: float | None) -> None:
    """The previous stage again: with its embedding of guidance, and with its way of seeing two times."""
    teacher, student = fresh(split=split, guidance=True), fresh(split=split, guidance=True)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3)
    copy_teacher(student, teacher)
    x, t, r, label = batch()
    w = torch.stack((1 + 7 * t, t / 2, (1 + t) / 2), dim=1)
    wanted = teacher(x, t, r, label, w)
    assert torch.equal(student(x, t, r, label, w), wanted)
    assert not torch.allclose(wanted, teacher(x, t, r, label), atol=1e-3)
    with pytest.raises(ValueError, match=r"left over \['embed_guidance\.inner"):
        copy_teacher(fresh(split=split), teacher)


def test_what_is_added_to_a_teacher() -> None:
    """The second time; guidance, if it is an input; and where blocks are split between the times, nothing."""
    for how, names in (
        ({}, {SECOND_TIME}),
        ({"guidance": True}, {SECOND_TIME, GUIDANCE}),
        ({"split": 0.5}, set()),
        ({"split": 0.5, "guidance": True}, {GUIDANCE}),
    ):
        added = set(fresh(**how).state_dict()) - set(trained().state_dict())
        assert {name.partition(".")[0] for name in added} == names


def test_weights_that_do_not_fit_are_refused() -> None:
    student = fresh()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"reshaped \['.*enter\.weight"):
        copy_teacher(student, trained(config=MLPConfig(width=16, depth=2)))
    with pytest.raises(ValueError, match=r"reshaped \['embed_label\.weight'\]"):
        copy_teacher(student, trained(classes=3))
    with pytest.raises(ValueError, match=r"missing \['blocks\.1\."):
        copy_teacher(student, trained(config=MLPConfig(width=32, depth=1)))
    with pytest.raises(ValueError, match=r"left over \['blocks\.2\."):
        copy_teacher(student, trained(config=MLPConfig(width=32, depth=3)))
    with pytest.raises(ValueError, match=r"missing \['embed_label\.weight'\]"):
        copy_teacher(student, trained(classes=0))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# --------------------------------------------------------------------------------------------------------------- maps


class Affine(nn.Module):
    """``u = x + 10 t + 100 r``, so that each argument shows."""

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return x + (10 * t_B + 100 * r_B)[:, None]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_average_velocity_map_by_hand() -> None:
    """``x - (t - r) u(x, t, r)``, each row at its own times: 2 - 0.5 (2 + 8 + 30) and 1 - 0.25 (1 + 5 + 25)."""
    x, t, r = column(2, 1)[:, None], column(0.8, 0.5), column(0.3, 0.25)
    wanted = column(-18, -6.75)[:, None]
    torch.testing.assert_close(AverageVelocityMap(Affine())(x, t, r), wanted, rtol=0, atol=1e-12)


def test_consistency_map_by_hand() -> None:
    """``x - t F(x, t, 0)``: 2 - 0.8 (2 + 8)."""
    x, t = column(2)[:, None], column(0.8)
    torch.testing.assert_close(ConsistencyMap(Affine())(x, t, 0 * t), column(-6)[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [AverageVelocityMap, ConsistencyMap])
def test_a_jump_of_no_length_is_the_identity(kind: type) -> None:
    """To the bit, for any network, at every time and in any domain."""
    flow_map: FlowMap = kind(trained(two_times=True))
    x, t, _, label = batch()
    t[:2] = torch.tensor([0.0, 1.0])
    assert torch.equal(flow_map(x, t, t, label), x)
    assert flow_map.nfe == 1


def test_labels_reach_the_network() -> None:
    net = trained(two_times=True)
    x, t, r, label = batch()
    gap = (t - r)[:, None, None]
    torch.testing.assert_close(AverageVelocityMap(net)(x, t, r, label), x - gap * net(x, t, r, label))
    zero = torch.zeros_like(t)
    torch.testing.assert_close(ConsistencyMap(net)(x, t, zero, label), x - t[:, None, None] * net(x, t, zero, label))
    assert not torch.allclose(AverageVelocityMap(net)(x, t, r, label), AverageVelocityMap(net)(x, t, r))


def test_off_domain_jumps_are_refused() -> None:
    """Also where one row of many is at fault; nothing is clamped."""
    x, t = torch.ones(2, 1), torch.tensor([1.0, 0.5])
    net = Affine()
    grid = AverageVelocityMap(net, TimeDomain("grid", (1.0, 0.5, 0.0)))
    grid(x, t, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="consecutive nodes"):
        grid(x, t, torch.tensor([0.5, 0.25]))
    with pytest.raises(ValueError, match="consecutive nodes"):
        grid(x, t, torch.tensor([0.0, 0.0]))
    with pytest.raises(ValueError, match="only jumps to data"):
        ConsistencyMap(net)(x, t, torch.tensor([0.0, 0.25]))
    for flow_map in (AverageVelocityMap(net), ConsistencyMap(net), grid):
        with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
            flow_map(x, t, torch.tensor([1.0, 0.75]))
        with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
            flow_map(x, torch.tensor([1.5, 0.5]), torch.tensor([0.5, 0.5]))


# ----------------------------------------------------------------------------------------------------------- guidance


def test_guidance_reaches_the_network() -> None:
    """The same three numbers for every sample; a map without them asks nothing of its network."""
    net = fresh(guidance=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, r, label = batch()
    guidance, numbers = GuidanceInput(2.5, 0.1, 0.8), torch.tensor([[2.5, 0.1, 0.8]]).expand(60, 3)
    gap, zero = (t - r)[:, None, None], torch.zeros_like(t)
    wanted = x - gap * net(x, t, r, label, numbers)
    assert torch.equal(AverageVelocityMap(net, guidance=guidance)(x, t, r, label), wanted)
    assert not torch.allclose(AverageVelocityMap(net)(x, t, r, label), wanted, atol=1e-3)
    velocity = consistency_velocity(net, x, t, label, numbers)
    assert torch.equal(velocity, net(x, t, zero, label, numbers))
    wanted = x - t[:, None, None] * velocity
    assert torch.equal(ConsistencyMap(net, guidance=guidance)(x, t, zero, label), wanted)
    assert not torch.allclose(ConsistencyMap(net)(x, t, zero, label), wanted, atol=1e-3)


def test_guidance_has_the_precision_of_the_time() -> None:
    t = torch.full((2,), 0.5, dtype=torch.float64)
    assert GuidanceInput(1.1, 0.3).batch(t).tolist() == [[1.1, 0.3, 1.0]] * 2
    assert GuidanceInput(1.1).batch(t.float()).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(ValueError, match="positive number"):
        GuidanceInput(scale)


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.1), (0.8, 0.1), (float("nan"), 1.0)])
def test_windows_that_are_none(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="lower first"):
        GuidanceInput(2.0, *window)
