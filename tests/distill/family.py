"""What the tests of the flow-map family share: exact students, random networks, and the objective with its defaults.

MeanFlow is here for the tests of other parts too, as an objective that takes a derivative along the path.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MixtureSpec
from fewstep.distill.couplings import gaussian_noise
from fewstep.distill.flow_maps.free_flow import FreeFlow
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Eulerian, Rule
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.distill.flow_maps.velocity import TeacherVelocity, Velocity, conditional
from fewstep.distill.flow_maps.weights import AdaptivePower, plain
from fewstep.distill.objective import Objective
from fewstep.distill.tangent import Derivative, end_derivative, forward_derivative
from fewstep.flow import VelocityField
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.times import Pairs, TimePairs, Times, sorted_pairs, uniform

GAUSSIAN = GaussianTeacher(0.4, 0.6)
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.3, 0.7), means=((-1.5,), (1.0,)), stds=(0.4, 0.25)))
TEACHERS = pytest.mark.parametrize("teacher", [GAUSSIAN, LINE], ids=["gaussian", "mixture"])


Exact = GaussianTeacher | MixtureTeacher
KEY = Key(3, step=5)


def dyadic(u: Tensor) -> Tensor:
    """Uniform on the odd multiples of 1/512: exact in float32, and so are their differences."""
    return ((u * 256).floor() + 0.5) / 256


class ExactStudent(nn.Module):
    """``scale u(x, t, r) + shift`` with ``u`` exact at scale one and shift zero; remembers its last arguments."""

    def __init__(self, teacher: Exact, scale: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.seen = (x, t_B, r_B)
        return self.scale * self.teacher.average_velocity(x, t_B, r_B, label_B) + self.shift


def data(teacher: Exact, count: int) -> Batch:
    index = torch.arange(count)
    if isinstance(teacher, GaussianTeacher):
        x = teacher.sample(Key(1), index, (1,))
    else:
        x = teacher.sample(Key(1), index)
    return Batch(x.double(), None, index)


def random_network(classes: int = 0) -> nn.Module:
    """A two-time network in float64 whose every weight counts."""
    net = build_network(MLPConfig(width=16, depth=2), (3,), classes, two_times=True).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def random_batch(count: int = 24, classes: int = 0) -> Batch:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x, torch.arange(count) % classes if classes else None, torch.arange(count))


def gradients(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def matching(
    student: nn.Module,
    rule: Rule,
    velocity: Velocity = conditional,
    *,
    pairs: Pairs | None = None,
    jump_fraction: float = 0.75,
    derivative: Derivative = forward_derivative,
    **rest: Any,
) -> FlowMapMatching:
    """The regression under a rule, with exact times."""
    return FlowMapMatching(
        student,
        rule=rule,
        velocity=velocity,
        pairs=pairs or sorted_pairs(dyadic),
        jump_fraction=jump_fraction,
        derivative=derivative,
        **rest,
    )


def double_noise(batch: Batch, key: Key) -> Tensor:
    return gaussian_noise(batch, key).double()


def free_flow(student: nn.Module, teacher: Exact, *, correction: float = 0.0, **changes: object) -> FreeFlow:
    settings = {"ends": dyadic, "derivative": end_derivative, "renoise": dyadic, "noise": double_noise, **changes}
    return FreeFlow(student, teacher=teacher, correction=correction, **settings)


class ExactTrajectories(TrajectoryRegression):
    """With a solver that makes no error."""

    def solve(self, e: Tensor, times_GN: Tensor, label: Tensor | None) -> Tensor:
        one = torch.ones(len(e))
        return torch.stack([self.teacher.flow_map(e, one, t, label) for t in times_GN.unbind(1)], dim=1)


def double_pairs(key: Key, index: Tensor, jump: Tensor) -> TimePairs:
    """The same times in float64, in which a network also embeds them."""
    pairs = sorted_pairs(dyadic)(key, index, jump)
    return TimePairs(pairs.t.double(), pairs.r.double())


def deltas(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The deviations that the objective weighs, with graph, and the states and times they belong to."""
    caught: list[tuple[Tensor, Tensor, Tensor]] = []

    def weight(delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        caught.append((delta, t_B, r_B))
        return delta.flatten(1).square().mean(dim=1)

    objective.weight = weight
    objective(batch, KEY)
    ((delta, t, r),) = caught
    if isinstance(objective, FlowMapMatching):
        return delta, objective.rows(batch, KEY)[0].x, t, r
    return delta, objective.student.seen[0], t, r


def root(delta: Tensor) -> float:
    return float(delta.detach().square().mean().sqrt())


def meanflow(
    student: nn.Module,
    velocity: VelocityField | None = None,
    *,
    times: Times = uniform,
    jump_fraction: float = 0.5,
    weight_power: float = 0.0,
    weight_offset: float = 1e-2,
    derivative: Derivative = forward_derivative,
) -> FlowMapMatching:
    """MeanFlow from a teacher's velocity, or from the data's where that is None."""
    return FlowMapMatching(
        student,
        rule=Eulerian(),
        velocity=conditional if velocity is None else TeacherVelocity(velocity),
        pairs=sorted_pairs(times),
        jump_fraction=jump_fraction,
        weight=AdaptivePower(weight_power, weight_offset) if weight_power else plain,
        derivative=derivative,
    )
