"""Consistency distillation: its loss at the exact function, its boundary, its target, its distance, its fixed point."""

import math
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MixtureSpec
from fewstep.distill.consistency.measures import step_length
from fewstep.distill.consistency.objective import AlongTeacher, ConsistencyMatching
from fewstep.distill.consistency.schedules import Constant, Doubling
from fewstep.distill.consistency.steps import GridSteps, even_nodes
from fewstep.distill.flow_maps.weights import PseudoHuber, plain
from fewstep.flow import VelocityField
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.sampling import SOLVERS, Solver, sample_map
from fewstep.students.maps import ConsistencyMap
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher

EXACT = {"rtol": 0.0, "atol": 1e-12}
KEY = Key(3, step=5)
# Overlapping, so that no separatrix between the modes dominates a mean of squared errors.
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.4, 0.6), means=((-0.7,), (0.6,)), stds=(0.5, 0.4)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def consistency(
    student: nn.Module,
    teacher: VelocityField,
    *,
    solver: Solver = "euler",
    nodes: int = 8,
    intervals: Doubling | None = None,
    target_decay: float = 0.0,
    huber: float = 0.0,
) -> ConsistencyMatching:
    return ConsistencyMatching(
        student,
        steps=GridSteps(even_nodes, intervals or Constant(nodes)),
        nearer=AlongTeacher(teacher, solver),
        distance=PseudoHuber(0.00054 * huber) if huber else plain,
        unit=step_length,
        target_decay=target_decay,
    )


def random_network(seed: int = 0) -> nn.Module:
    net = build_network(MLPConfig(width=16, depth=1), (3,), 0, two_times=True).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def random_batch(count: int = 32, seed: int = 1) -> Batch:
    return Batch(normal(count, 3, seed=seed), None, torch.arange(count))


class ExactStudent(nn.Module):
    """The network whose consistency function is exact: its value at r = 0 is the average velocity down to data."""

    def __init__(self, teacher: GaussianTeacher | MixtureTeacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return self.scale * self.teacher.average_velocity(x, t_B, r_B, label_B)


@dataclass(frozen=True)
class Draws:
    """What the objective draws for a batch, written a second time."""

    x_t: Tensor
    t: Tensor
    r: Tensor


def draws(batch: Batch, nodes: int) -> Draws:
    k = (nodes * KEY.uniform("time", batch.index)).floor()
    t, r = (nodes - k) / nodes, (nodes - k - 1) / nodes
    e = KEY.normal("noise", batch.index, tuple(batch.x.shape[1:]))
    return Draws((1 - t)[:, None] * batch.x + t[:, None] * e, t, r)


def f(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return x - t[:, None] * net(x, t, torch.zeros_like(t))


# ------------------------------------------------------------------------------------------------ the exact function


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_loss_of_the_exact_function_falls_with_the_grid(solver: Solver, order: int) -> None:
    """One solver step of length h misses the trajectory by h^(p + 1), so the root residual has that slope and the loss,
    a square over h, has slope 2 p + 1. Mixture, 32 to 256 nodes. Measured: 1.999, 2.996, 2.996; 2.999, 4.993, 4.992."""
    n = 2000
    batch = Batch(LINE.sample(Key(1), torch.arange(n)).double(), None, torch.arange(n))
    counts = np.array([32, 64, 128, 256])
    residuals, losses = [], []
    for nodes in counts:
        output = consistency(ExactStudent(LINE), LINE, solver=solver, nodes=int(nodes)).forward(batch, KEY)
        residuals.append(math.sqrt(float(output.residual_B.mean())))
        losses.append(float(output.per_sample_B.detach().mean()))
    slope = -np.polyfit(np.log(counts), np.log(residuals), 1)[0]
    assert slope == pytest.approx(order + 1, abs=0.05)
    assert -np.polyfit(np.log(counts), np.log(losses), 1)[0] == pytest.approx(2 * order + 1, abs=0.1)


def test_exact_steps_give_no_loss() -> None:
    """A teacher whose Euler step is the exact flow, ``v = u(x, t, t - 1/N)``: the exact function has residual zero."""
    teacher, nodes = GaussianTeacher(0.4, 0.6), 16

    @dataclass(frozen=True)
    class ExactSteps:
        nfe: int = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return teacher.average_velocity(x, t_B, t_B - 1 / nodes)

    loss = consistency(ExactStudent(teacher), ExactSteps(), nodes=nodes).forward(random_batch(), KEY).per_sample_B
    assert float(loss.detach().max().sqrt()) < 1e-12
    off = ExactStudent(teacher)
    off.scale.data *= 1.1
    loss = consistency(off, ExactSteps(), nodes=nodes).forward(random_batch(), KEY).per_sample_B
    assert float(loss.detach().mean()) > 1e-4


class Gains(nn.Module):
    """The linear model ``f(x, t_k) = g_k x`` with one gain for each node ``t_k = k / N``, ``k = 1 .. N``."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.full((nodes,), 0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        k = (t_B * len(self.gains)).round().long()
        gain = self.gains[(k - 1).clamp(min=0)]
        return ((1 - gain) / t_B.clamp(min=1e-9))[:, None] * x


def test_fixed_point_on_a_gaussian() -> None:
    """Trained to convergence the gain at t = 1 is that of 32 Euler steps, .47736 at s = 1/2 and not s: Newton's method
    on each gain, whose loss is a parabola, carries the boundary value from node to node in 32 rounds."""
    nodes, n, s = 32, 1000, 0.5
    student = Gains(nodes)
    objective = consistency(student, GaussianTeacher(0.0, s), nodes=nodes)
    batch = Batch(GaussianTeacher(0.0, s).sample(Key(1), torch.arange(n), (1,)).double(), None, torch.arange(n))
    for _ in range(nodes):
        loss = objective.forward(batch, KEY).per_sample_B.mean()
        (slope,) = torch.autograd.grad(loss, student.gains, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), student.gains)
        student.gains.data -= (slope / curvature).detach()
    assert student.gains[-1].item() == pytest.approx(0.47736, abs=5e-6)
    assert student.gains[-1].item() == pytest.approx(oracle.euler_gain(32, s), abs=1e-12)
    assert float(objective.forward(batch, KEY).per_sample_B.detach().max()) < 1e-24
    # Through the student's own map, in one evaluation.
    e = normal(10, 1)
    sample = sample_map(ConsistencyMap(student), e, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(sample.x, oracle.euler_gain(32, s) * e, **EXACT)


# --------------------------------------------------------------------------------------------------------- the target


def test_boundary() -> None:
    """``f(x, 0) = x`` to the bit, for any network; ``f(x, t) = x - t F(x, t, r = 0)``."""
    net, x = random_network(), normal(5, 3)
    zero, t = torch.zeros(5, dtype=torch.float64), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    assert torch.equal(ConsistencyMap(net)(x, zero, zero), x)
    torch.testing.assert_close(ConsistencyMap(net)(x, t, zero), f(net, x, t), **EXACT)


@pytest.mark.parametrize("solver", SOLVERS)
def test_loss_by_hand(solver: Solver) -> None:
    """``|| f(x_t, t) - sg f(x_r, r) ||^2 / D / (t - r)`` with its gradient, which does not enter the target."""
    net, teacher, batch, nodes = random_network(), GaussianTeacher(0.2, 0.5), random_batch(), 8
    output = consistency(net, teacher, solver=solver, nodes=nodes).forward(batch, KEY)
    at = draws(batch, nodes)
    target = f(net, SOLVERS[solver](teacher, at.x_t, at.t, at.r, None).x, at.r).detach()
    wanted = nodes * (f(net, at.x_t, at.t) - target).square().sum(dim=1) / 3
    torch.testing.assert_close(output.per_sample_B, wanted, **EXACT)
    assert float(output.residual_B.mean()) == pytest.approx(float(wanted.detach().mean()) / nodes, rel=1e-12)
    parameters = list(net.parameters())
    ours = torch.autograd.grad(output.per_sample_B.mean(), parameters)
    theirs = torch.autograd.grad(wanted.mean(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_times_are_neighbouring_nodes() -> None:
    """Uniform over the intervals: chi-square of 8 counts below its 0.1 % point."""
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            assert not r_B.any()
            seen.append(t_B)
            return x

    n = 8000
    batch = Batch(torch.zeros(n, 1), None, torch.arange(n))
    consistency(Recorder(), GaussianTeacher(0.0, 1.0)).forward(batch, KEY)
    r, t = seen
    assert torch.equal(t - r, torch.full((n,), 1 / 8))
    counts = torch.stack([(t == k / 8).sum() for k in range(1, 9)]).double()
    assert int(counts.sum()) == n
    assert float(((counts - n / 8) ** 2 / (n / 8)).sum()) < 24.32


def test_last_jump_ends_at_the_teachers_point() -> None:
    """At r = 0 the target is where the teacher lands, whatever the student says: with one node, on every row."""
    net, teacher, batch = random_network(), GaussianTeacher(0.2, 0.5), random_batch()
    loss = consistency(net, teacher, nodes=1).forward(batch, KEY).per_sample_B
    e = KEY.normal("noise", batch.index, (3,)).double()
    landed = e - teacher(e, torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(landed, torch.full_like(e, 0.2), **EXACT)
    wanted = (f(net, e, torch.ones(32, dtype=torch.float64)) - landed).square().mean(dim=1)
    torch.testing.assert_close(loss, wanted, **EXACT)


def test_target_average_by_hand() -> None:
    """``target <- d target + (1 - d) online`` after each step, from a copy of the student; the loss uses it."""
    net, teacher, decay = random_network(), GaussianTeacher(0.2, 0.5), 0.75
    objective = consistency(net, teacher, target_decay=decay)
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    for step in range(3):
        for parameter in net.parameters():
            parameter.data += 0.1 * (step + 1) * torch.cos(parameter.data)
        objective.after_step()
        expected = [
            decay * average + (1 - decay) * parameter.detach()
            for average, parameter in zip(expected, net.parameters(), strict=True)
        ]
        for average, parameter in zip(expected, objective.target_network.parameters(), strict=True):
            torch.testing.assert_close(parameter, average, **EXACT)
            assert not parameter.requires_grad
    batch = random_batch()
    at = draws(batch, 8)
    x_r = at.x_t - teacher(at.x_t, at.t) / 8
    wanted = 8 * (f(net, at.x_t, at.t) - f(objective.target_network, x_r, at.r)).square().mean(dim=1)
    torch.testing.assert_close(objective.forward(batch, KEY).per_sample_B, wanted, **EXACT)
    assert not torch.allclose(consistency(net, teacher).forward(batch, KEY).per_sample_B, wanted, rtol=1e-3)


def test_decay_zero_is_the_student_itself() -> None:
    net = random_network()
    objective = consistency(net, GaussianTeacher(0.0, 1.0))
    objective.after_step()
    assert objective.target_network is net
    assert objective.extra_state() == {}
    objective.load_extra_state({})
    with pytest.raises(ValueError, match="no extra state"):
        objective.load_extra_state({"target.weight": torch.ones(1)})


def test_target_is_no_part_of_the_trained_module_but_of_its_state() -> None:
    """Its weights are not parameters, they follow the module's device and precision, and they can be saved."""
    objective = consistency(random_network(), GaussianTeacher(0.0, 1.0), target_decay=0.9)
    assert len(list(objective.parameters())) == len(list(objective.student.parameters()))
    objective.to(torch.float32)
    assert {parameter.dtype for parameter in objective.target_network.parameters()} == {torch.float32}
    other = consistency(random_network(seed=4), GaussianTeacher(0.0, 1.0), target_decay=0.9).float()
    other.load_extra_state(objective.extra_state())
    pairs = zip(objective.target_network.parameters(), other.target_network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("huber", [1.0, 500.0])
def test_huber_distance(huber: float) -> None:
    """``sqrt(||d||^2 + c^2) - c`` with ``c = 0.00054 sqrt(D) huber``, over ``t - r``: the norm far out, and
    ``||d||^2 / (2 c)`` near zero."""
    net, teacher, batch, nodes = random_network(), GaussianTeacher(0.2, 0.5), random_batch(), 8
    square = consistency(net, teacher, nodes=nodes).forward(batch, KEY).per_sample_B * 3 / nodes
    c = 0.00054 * math.sqrt(3) * huber
    loss = consistency(net, teacher, nodes=nodes, huber=huber).forward(batch, KEY).per_sample_B
    torch.testing.assert_close(loss, nodes * ((square + c * c).sqrt() - c), **EXACT)
    if huber == 1:
        torch.testing.assert_close(loss, nodes * square.sqrt(), rtol=0, atol=nodes * c)


def test_curriculum_doubles_the_nodes() -> None:
    """From 4 to 32 in four equal parts of 100 steps, and the grid of the step is the one the loss uses."""
    net, teacher = random_network(), GaussianTeacher(0.2, 0.5)
    doubling = Doubling(4, 32, 100)
    objective = consistency(net, teacher, intervals=doubling)
    counts = {0: 4, 24: 4, 25: 8, 49: 8, 50: 16, 74: 16, 75: 32, 99: 32, 200: 32}
    assert {step: doubling(step) for step in counts} == counts
    batch = random_batch()
    for step, nodes in counts.items():
        key = Key(0, step)
        wanted = consistency(net, teacher, nodes=nodes).forward(batch, key).per_sample_B
        assert torch.equal(objective.forward(batch, key).per_sample_B, wanted)
