"""Progressive distillation: the two-step target, its chain down to one step, its times, and what it refuses.

Float64; on grids of powers of two every node is exact.
"""

import itertools
from dataclasses import dataclass, field

import oracle
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MIXTURE_1D, MixtureSpec
from fewstep.distill.progressive import ProgressiveStage, SolverMap, stage_domain, stage_steps
from fewstep.flow import FlowMap, TimeDomain, uniform_grid
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.sampling import SOLVERS, Solver, sample_map, sample_ode
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap
from fewstep.teachers.analytic import ExactMap, GaussianTeacher, MixtureTeacher
from fewstep.teachers.guided import guided
from fewstep.teachers.network import freeze

EXACT = {"rtol": 0.0, "atol": 1e-12}
KEY = Key(3, step=5)
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.3, 0.7), means=((-1.5,), (1.0,)), stds=(0.4, 0.25)))
CLASSES = MixtureTeacher.from_spec(MIXTURE_1D)
NOTHING = nn.Identity()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, dtype=torch.float64)


def random_network() -> nn.Module:
    net = build_network(MLPConfig(width=16, depth=1), (3,), 0, two_times=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return net


@dataclass
class Recorder:
    """A flow map that remembers the states and times it was called with."""

    inner: FlowMap
    domain: TimeDomain = field(default=TimeDomain("any"))
    nfe: int = 1
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.calls.append((x, t_B, r_B))
        return self.inner(x, t_B, r_B, label_B)


# -------------------------------------------------------------------------------------------------------- the target


@pytest.mark.parametrize("solver", SOLVERS)
def test_target_is_two_steps_of_the_teacher(solver: Solver) -> None:
    """``x_t - (t - s) v*`` is where two solver steps land; the ends of the step lie anywhere, the middle too."""
    x = normal(40, 1)
    t, m, s = 0.875, 0.75, 0.25
    stage = ProgressiveStage(NOTHING, teacher=SolverMap(LINE, solver), steps=4)
    v = stage.target(x, at(t, x), at(m, x), at(s, x), None)
    two = sample_ode(LINE, x, torch.tensor([t, m, s], dtype=torch.float64), solver=solver).x
    torch.testing.assert_close(v, (x - two) / (t - s), **EXACT)
    torch.testing.assert_close(x - (t - s) * v, two, **EXACT)


def test_euler_target_is_the_weighted_mean_of_two_velocities() -> None:
    """``v* = [(t - m) v1 + (m - s) v2] / (t - s)``, and ``(t x_s - s x_t) / (t - s) = x_t - t v*`` in data space."""
    x, t, m, s = normal(40, 1), 0.875, 0.75, 0.25
    stage = ProgressiveStage(NOTHING, teacher=SolverMap(LINE), steps=4)
    v = stage.target(x, at(t, x), at(m, x), at(s, x), None)
    v1 = LINE(x, at(t, x))
    v2 = LINE(x - (t - m) * v1, at(m, x))
    torch.testing.assert_close(v, ((t - m) * v1 + (m - s) * v2) / (t - s), **EXACT)
    x_s = x - (t - m) * v1 - (m - s) * v2
    torch.testing.assert_close((t * x_s - s * x) / (t - s), x - t * v, **EXACT)


def test_target_is_a_constant() -> None:
    """No gradient flows into the teacher, even one whose weights would take it."""
    x = normal(4, 3).float()
    stage = ProgressiveStage(NOTHING, teacher=AverageVelocityMap(random_network()), steps=1)
    v = stage.target(x, torch.ones(4), torch.full((4,), 0.5), torch.zeros(4), None)
    assert not v.requires_grad


def test_target_of_an_exact_teacher_is_its_average_velocity() -> None:
    x = normal(40, 1)
    stage = ProgressiveStage(NOTHING, teacher=ExactMap(LINE), steps=2)
    v = stage.target(x, at(1.0, x), at(0.75, x), at(0.5, x), None)
    torch.testing.assert_close(v, LINE.average_velocity(x, at(1.0, x), at(0.5, x)), **EXACT)


@pytest.mark.parametrize("w", [0.0, 2.5])
def test_guidance_is_folded_into_the_target(w: float) -> None:
    """Both steps are guided, the second from the point the guided first one reached; by hand, with labels."""
    x, label = normal(42, 1), torch.arange(42) % 3
    stage = ProgressiveStage(NOTHING, teacher=SolverMap(guided(CLASSES, w, 3)), steps=2)
    v = stage.target(x, at(0.5, x), at(0.25, x), at(0.0, x), label)

    def combined(x: Tensor, t: float) -> Tensor:
        return (1 - w) * CLASSES(x, at(t, x)) + w * CLASSES(x, at(t, x), label)

    v1 = combined(x, 0.5)
    v2 = combined(x - 0.25 * v1, 0.25)
    torch.testing.assert_close(v, (v1 + v2) / 2, **EXACT)


def test_guiding_an_affine_teacher_commutes_with_the_target() -> None:
    """With Gaussian class and null models of one width the velocities differ by a constant: the guided target is then
    the guidance of the two targets, each with its own steps."""
    x, w = normal(40, 1), 2.5
    conditional, null = GaussianTeacher(1.0, 0.5), GaussianTeacher(-0.4, 0.5)

    @dataclass(frozen=True)
    class Both:
        nfe: int = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            assert label_B is not None
            return torch.where(label_B[:, None] == 0, conditional(x, t_B), null(x, t_B))

    def target(teacher: FlowMap) -> Tensor:
        stage = ProgressiveStage(NOTHING, teacher=teacher, steps=2)
        return stage.target(x, at(1.0, x), at(0.75, x), at(0.5, x), torch.zeros(40, dtype=torch.int64))

    v_c, v_u = target(SolverMap(conditional, "heun")), target(SolverMap(null, "heun"))
    v = target(SolverMap(guided(Both(), w, 1), "heun"))
    torch.testing.assert_close(v, v_u + w * (v_c - v_u), **EXACT)
    assert (v_c - v_u).abs().min() > 0.1


# ---------------------------------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class IdealStudent:
    """The student of a stage that learned its target perfectly: it jumps by ``v*``, between its own nodes only."""

    stage: ProgressiveStage
    nfe: int = 1

    @property
    def domain(self) -> TimeDomain:
        return stage_domain(self.stage.steps)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        v = self.stage.target(x, t_B, (t_B + r_B) / 2, r_B, label_B)
        return x - (t_B - r_B)[:, None] * v


@pytest.mark.parametrize(("solver", "far"), [("euler", 0.02), ("heun", 2e-4)])
def test_chain_of_ideal_students_is_the_first_teacher(solver: Solver, far: float) -> None:
    """64 -> 32 -> ... -> 1: the one-step student is the 64-step sampler, and is not the exact flow."""
    e = normal(50, 1)
    teacher: FlowMap = SolverMap(LINE, solver)
    for steps in stage_steps(64, 1):
        teacher = IdealStudent(ProgressiveStage(NOTHING, teacher=teacher, steps=steps))
        few = sample_map(teacher, e, uniform_grid(steps, dtype=torch.float64)).x
        many = sample_ode(LINE, e, uniform_grid(64, dtype=torch.float64), solver=solver).x
        torch.testing.assert_close(few, many, **EXACT)
    assert (few - LINE.flow_map(e, at(1.0, e), at(0.0, e))).abs().max() > far


def test_chain_on_a_gaussian_is_the_euler_gain() -> None:
    """One jump of the last ideal student multiplies noise by P_64 of the closed form."""
    e = normal(20, 1)
    teacher: FlowMap = SolverMap(GaussianTeacher(0.0, 0.5))
    for steps in stage_steps(64, 1):
        teacher = IdealStudent(ProgressiveStage(NOTHING, teacher=teacher, steps=steps))
    torch.testing.assert_close(teacher(e, at(1.0, e), at(0.0, e)), oracle.euler_gain(64, 0.5) * e, **EXACT)


# ----------------------------------------------------------------------------------------------------- loss and times


def test_loss_by_hand() -> None:
    """``|| u(x_t, t, s) - v* ||^2 / D`` on the objective's own draws, and nothing flows into the target."""
    net, teacher = random_network(), GaussianTeacher(0.2, 0.6)
    index = torch.tensor([5, 3, 11, 0])
    batch = Batch(normal(4, 3).float(), None, index)
    stage = ProgressiveStage(net, teacher=SolverMap(teacher), steps=4)
    output = stage.forward(batch, KEY)
    k = (4 * KEY.uniform("time", index)).long()
    t, s = (4 - k) / 4, (3 - k) / 4
    x_t = (1 - t)[:, None] * batch.x + t[:, None] * KEY.normal("noise", index, (3,))
    x_m = x_t - teacher(x_t, t) / 8
    v = (x_t - (x_m - teacher(x_m, t - 1 / 8) / 8)) * 4
    wanted = (net(x_t, t, s) - v).square().sum(dim=1) / 3
    torch.testing.assert_close(output.per_sample_B, wanted, rtol=1e-4, atol=1e-5)
    assert float(output.residual_B.mean()) == pytest.approx(float(wanted.detach().mean()), rel=1e-4)
    (ours,), (theirs,) = (torch.autograd.grad(loss.mean(), [net.leave.bias]) for loss in (output.per_sample_B, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_times_are_the_students_own_nodes(steps: int) -> None:
    """Uniform over the steps (chi-square below its 0.1 % point); the middle is the middle, the end the next node."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Student(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            seen.append((t_B, r_B))
            return x

    n = 6000
    teacher = Recorder(ExactMap(GaussianTeacher(0.0, 1.0)))
    stage = ProgressiveStage(Student(), teacher=teacher, steps=steps)
    stage.forward(Batch(torch.zeros(n, 1), None, torch.arange(n)), KEY)
    ((t, s),) = seen
    (first_x, first_t, first_m), (second_x, second_m, second_s) = teacher.calls
    assert torch.equal(first_t, t)
    assert torch.equal(second_s, s)
    assert torch.equal(first_m, second_m)
    torch.testing.assert_close(first_m, (t + s) / 2)
    torch.testing.assert_close(t - s, torch.full((n,), 1 / steps))
    torch.testing.assert_close(second_x, teacher.inner(first_x, t, first_m))
    nodes = (t * steps).round()
    torch.testing.assert_close(t * steps, nodes)
    counts = torch.stack([(nodes == k).sum() for k in range(1, steps + 1)]).double()
    assert int(counts.sum()) == n
    chi_square = float(((counts - n / steps) ** 2 / (n / steps)).sum())
    assert chi_square < {1: 1e-9, 4: 16.27, 6: 20.52}[steps]


def test_training_leaves_the_teacher_alone() -> None:
    """A previous student as teacher: its bits, its mode and its (absent) gradients are as before."""
    previous = freeze(random_network())
    before = {name: value.clone() for name, value in previous.state_dict().items()}
    net = random_network()
    stage = ProgressiveStage(net, teacher=AverageVelocityMap(previous, stage_domain(4)), steps=2)
    assert {id(p) for p in stage.parameters()} == {id(p) for p in net.parameters()}
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    for step in range(3):
        batch = Batch(normal(16, 3, seed=step).float(), None, torch.arange(16))
        stage.forward(batch, Key(0, step)).per_sample_B.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        stage.after_step()
    assert not any(torch.equal(a, b) for a, b in zip(start, net.parameters(), strict=True))
    for name, value in previous.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in previous.parameters())
    assert not previous.training


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_teacher_must_serve_the_inserted_nodes() -> None:
    net = random_network()
    for steps, served in itertools.product((1, 2, 4), (1, 2, 4, 8)):
        teacher = AverageVelocityMap(net, stage_domain(served))
        if served == 2 * steps:
            ProgressiveStage(NOTHING, teacher=teacher, steps=steps)
        else:
            with pytest.raises(ValueError, match="consecutive nodes"):
                ProgressiveStage(NOTHING, teacher=teacher, steps=steps)
    with pytest.raises(ValueError, match="only jumps to data"):
        ProgressiveStage(NOTHING, teacher=ConsistencyMap(net), steps=1)


def test_stage_steps() -> None:
    assert stage_steps(32, 1) == (16, 8, 4, 2, 1)
    assert stage_steps(12, 3) == (6, 3)
    assert stage_steps(2, 1) == (1,)
    with pytest.raises(ValueError, match="12 steps cannot be halved down to 1: 3 is odd"):
        stage_steps(12, 1)
    for start, end in ((8, 8), (4, 8), (8, 3), (1, 1)):
        with pytest.raises(ValueError, match=f"{start} steps cannot be halved down to {end}"):
            stage_steps(start, end)


def test_stage_domain() -> None:
    domain = stage_domain(4)
    assert domain == TimeDomain("grid", (1.0, 0.75, 0.5, 0.25, 0.0))
    domain.check(0.75, 0.5)
    for t, r in ((1.0, 0.5), (0.5, 0.375), (0.25, 0.5)):
        with pytest.raises(ValueError, match="jump"):
            domain.check(t, r)


def test_evaluations_of_a_solver_map() -> None:
    fields = (CLASSES, guided(CLASSES, 2.0, 3))
    counts = [SolverMap(teacher, solver).nfe for teacher in fields for solver in ("euler", "heun", "midpoint")]
    assert counts == [1, 2, 2, 2, 4, 4]
