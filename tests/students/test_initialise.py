"""A student that starts as its teacher, to the bit, and student networks as flow maps."""

import pytest
import torch
from torch import Tensor, nn

from fewstep.flow import FlowMap, TimeDomain
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.students.initialise import SECOND_TIME, copy_teacher
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap

CONFIG = MLPConfig(width=32, depth=2)


def trained(*, two_times: bool = False, seed: int = 0, config: MLPConfig = CONFIG, classes: int = 4) -> nn.Module:
    """A network with weights as after training: none is zero."""
    net = build_network(config, (2, 3), classes, two_times=two_times)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


def fresh() -> nn.Module:
    torch.manual_seed(5)
    return build_network(CONFIG, (2, 3), 4, two_times=True)


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


def test_the_second_time_is_all_that_is_added() -> None:
    added = set(fresh().state_dict()) - set(trained().state_dict())
    assert added
    assert all(name.startswith(SECOND_TIME) for name in added)


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
