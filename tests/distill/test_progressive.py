"""Progressive distillation: the two-step target, its chain down to one step, its times, and what it refuses.

Float64; on grids of powers of two every node is exact.
"""

import itertools
from dataclasses import dataclass, field
from itertools import pairwise

import oracle
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MIXTURE_1D, MixtureSpec
from fewstep.distill.progressive.objective import ProgressiveStage, SolverMap, stage_steps, two_steps
from fewstep.distill.progressive.optimised_grid import optimised_nodes, step_costs
from fewstep.distill.time_weights import TIME_WEIGHTS, TimeWeight, edm_weight
from fewstep.flow import LINEAR, FlowMap, TimeDomain
from fewstep.grids import Grid, cosine_nodes, shifted_nodes, thinned, uniform_nodes
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
    v = two_steps(SolverMap(LINE, solver), x, at(t, x), at(m, x), at(s, x))
    two = sample_ode(LINE, x, torch.tensor([t, m, s], dtype=torch.float64), solver=solver).x
    torch.testing.assert_close(v, (x - two) / (t - s), **EXACT)
    torch.testing.assert_close(x - (t - s) * v, two, **EXACT)


def test_euler_target_is_the_weighted_mean_of_two_velocities() -> None:
    """``v* = [(t - m) v1 + (m - s) v2] / (t - s)``, and ``(t x_s - s x_t) / (t - s) = x_t - t v*`` in data space."""
    x, t, m, s = normal(40, 1), 0.875, 0.75, 0.25
    v = two_steps(SolverMap(LINE), x, at(t, x), at(m, x), at(s, x))
    v1 = LINE(x, at(t, x))
    v2 = LINE(x - (t - m) * v1, at(m, x))
    torch.testing.assert_close(v, ((t - m) * v1 + (m - s) * v2) / (t - s), **EXACT)
    x_s = x - (t - m) * v1 - (m - s) * v2
    torch.testing.assert_close((t * x_s - s * x) / (t - s), x - t * v, **EXACT)


def test_target_is_a_constant() -> None:
    """No gradient flows into the teacher, even one whose weights would take it."""
    x = normal(4, 3).float()
    v = two_steps(AverageVelocityMap(random_network()), x, torch.ones(4), torch.full((4,), 0.5), torch.zeros(4))
    assert not v.requires_grad


def test_target_of_an_exact_teacher_is_its_average_velocity() -> None:
    x = normal(40, 1)
    v = two_steps(ExactMap(LINE), x, at(1.0, x), at(0.75, x), at(0.5, x))
    torch.testing.assert_close(v, LINE.average_velocity(x, at(1.0, x), at(0.5, x)), **EXACT)


@pytest.mark.parametrize("w", [0.0, 2.5])
def test_guidance_is_folded_into_the_target(w: float) -> None:
    """Both steps are guided, the second from the point the guided first one reached; by hand, with labels."""
    x, label = normal(42, 1), torch.arange(42) % 3
    v = two_steps(SolverMap(guided(CLASSES, w, 3)), x, at(0.5, x), at(0.25, x), at(0.0, x), label)

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
        return two_steps(teacher, x, at(1.0, x), at(0.75, x), at(0.5, x), torch.zeros(40, dtype=torch.int64))

    v_c, v_u = target(SolverMap(conditional, "heun")), target(SolverMap(null, "heun"))
    v = target(SolverMap(guided(Both(), w, 1), "heun"))
    torch.testing.assert_close(v, v_u + w * (v_c - v_u), **EXACT)
    assert (v_c - v_u).abs().min() > 0.1


# ---------------------------------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class IdealStudent:
    """The student of a stage that learned its target perfectly: it jumps by ``v*``, between its own nodes only."""

    teacher: FlowMap
    teacher_grid: Grid
    nfe: int = 1

    @property
    def domain(self) -> TimeDomain:
        return TimeDomain("grid", self.teacher_grid[::2])

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        m = self.teacher_grid[self.teacher_grid.index(float(t_B[0])) + 1]
        v = two_steps(self.teacher, x, t_B, at(m, x), r_B, label_B)
        return x - (t_B - r_B)[:, None] * v


GRIDS: dict[str, Grid] = {
    "uniform": uniform_nodes(64),
    "shifted": shifted_nodes(64, 3.0),
    "shifted to data": shifted_nodes(64, 0.4),
    "cosine": cosine_nodes(64),
    "optimised": optimised_nodes(step_costs(LINE, normal(32, 1, seed=1), None, 96), 64),
}


@pytest.mark.parametrize(
    ("kind", "solver", "substeps"),
    [*((kind, solver, 1) for kind in GRIDS for solver in SOLVERS), ("uniform", "euler", 3), ("cosine", "heun", 2)],
)
def test_chain_of_ideal_students_is_the_first_teacher(kind: str, solver: Solver, substeps: int) -> None:
    """64 -> 32 -> ... -> 1: every student, the last included, is the 64-step sampler, and is not the exact flow."""
    e, grid = normal(25, 1), GRIDS[kind]
    finer = [
        torch.lerp(*torch.tensor(pair, dtype=torch.float64), k / substeps)
        for pair in pairwise(grid)
        for k in range(substeps)
    ]
    many = sample_ode(LINE, e, torch.tensor([*finer, 0.0], dtype=torch.float64), solver=solver).x
    teacher: FlowMap = SolverMap(LINE, solver, substeps)
    for steps in stage_steps(64, 1):
        stage = ProgressiveStage(NOTHING, teacher=teacher, teacher_grid=thinned(grid, 2 * steps))
        assert stage.grid == thinned(grid, steps)
        teacher = IdealStudent(teacher, stage.teacher_grid)
        few = sample_map(teacher, e, torch.tensor(stage.grid, dtype=torch.float64)).x
        torch.testing.assert_close(few, many, **EXACT)
    far = 0.02 if solver == "euler" else 1e-4
    assert (few - LINE.flow_map(e, at(1.0, e), at(0.0, e))).abs().max() > far / substeps**2


def test_the_chain_by_hand() -> None:
    """64 Euler steps written out, against one jump of the last student; and how far both are from the flow."""
    e = normal(50, 1)
    teacher: FlowMap = SolverMap(LINE)
    for steps in stage_steps(64, 1):
        teacher = IdealStudent(teacher, uniform_nodes(2 * steps))
    x = e
    for k in range(64, 0, -1):
        x = x - LINE(x, at(k / 64, x)) / 64
    torch.testing.assert_close(teacher(e, at(1.0, e), at(0.0, e)), x, **EXACT)
    assert float((x - LINE.flow_map(e, at(1.0, e), at(0.0, e))).abs().max()) > 0.02


def test_chain_on_a_gaussian_is_the_euler_gain() -> None:
    """One jump of the last ideal student multiplies noise by P_64 of the closed form."""
    e = normal(20, 1)
    teacher: FlowMap = SolverMap(GaussianTeacher(0.0, 0.5))
    for steps in stage_steps(64, 1):
        teacher = IdealStudent(teacher, uniform_nodes(2 * steps))
    torch.testing.assert_close(teacher(e, at(1.0, e), at(0.0, e)), oracle.euler_gain(64, 0.5) * e, **EXACT)


# ----------------------------------------------------------------------------------------------------- loss and times


def test_loss_by_hand() -> None:
    """``|| u(x_t, t, s) - v* ||^2 / D`` on the objective's own draws, and nothing flows into the target."""
    net, teacher = random_network(), GaussianTeacher(0.2, 0.6)
    index = torch.tensor([5, 3, 11, 0])
    batch = Batch(normal(4, 3).float(), None, index)
    stage = ProgressiveStage(net, teacher=SolverMap(teacher), teacher_grid=uniform_nodes(8))
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
    stage = ProgressiveStage(Student(), teacher=teacher, teacher_grid=uniform_nodes(2 * steps))
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


WEIGHTS: dict[str, TimeWeight] = {**TIME_WEIGHTS, "edm": edm_weight(0.6)}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_is_the_loss_of_another_prediction(kind: str) -> None:
    """Of data, noise and the velocity of the variance-preserving path, converted by their definitions; EDM's and
    truncated SNR by their formulas in the noise level. Times as far as the ends."""
    x, u, v, t = (
        normal(40, 3, seed=1),
        normal(40, 3, seed=2),
        normal(40, 3, seed=3),
        torch.linspace(1, 0.025, 40).double(),
    )
    data = [LINEAR.data_from_velocity(x, w, t) for w in (u, v)]
    noise = [LINEAR.noise_from_velocity(x, w, t) for w in (u, v)]
    alpha, sigma = ((c / (t**2 + (1 - t) ** 2).sqrt())[:, None] for c in (1 - t, t))
    rotated = [alpha * e - sigma * d for e, d in zip(noise, data, strict=True)]

    def square(pair: list[Tensor]) -> Tensor:
        return (pair[0] - pair[1]).square().mean(dim=1)

    snr, level = ((1 - t) / t) ** 2, t / (1 - t)
    wanted = {
        "velocity": square([u, v]),
        "data": square(data),
        "noise": square(noise),
        "snr_plus_one": square(rotated),
        "truncated_snr": square(data) * snr.clamp(min=1),
        "edm": square(data) * torch.where(t == 1, 1 / 0.36, (level**2 + 0.36) / (level * 0.6) ** 2),
    }
    torch.testing.assert_close(WEIGHTS[kind](t) * square([u, v]), wanted[kind], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_multiplies_the_loss_and_not_the_residual(kind: str) -> None:
    batch = Batch(normal(64, 3).float(), None, torch.arange(64))
    net, teacher = random_network(), SolverMap(GaussianTeacher(0.2, 0.6))
    plain = ProgressiveStage(net, teacher=teacher, teacher_grid=cosine_nodes(8))(batch, KEY)
    found = ProgressiveStage(net, teacher=teacher, teacher_grid=cosine_nodes(8), weight=WEIGHTS[kind])(batch, KEY)
    assert torch.equal(found.residual_B, plain.per_sample_B)
    torch.testing.assert_close(found.per_sample_B, WEIGHTS[kind](found.t_B) * plain.per_sample_B)


def test_training_leaves_the_teacher_alone() -> None:
    """A previous student as teacher: its bits, its mode and its (absent) gradients are as before."""
    previous = freeze(random_network())
    before = {name: value.clone() for name, value in previous.state_dict().items()}
    net = random_network()
    served = AverageVelocityMap(previous, TimeDomain("grid", uniform_nodes(4)))
    stage = ProgressiveStage(net, teacher=served, teacher_grid=uniform_nodes(4))
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
        teacher = AverageVelocityMap(net, TimeDomain("grid", uniform_nodes(served)))
        if served == 2 * steps:
            ProgressiveStage(NOTHING, teacher=teacher, teacher_grid=uniform_nodes(2 * steps))
        else:
            with pytest.raises(ValueError, match="consecutive nodes"):
                ProgressiveStage(NOTHING, teacher=teacher, teacher_grid=uniform_nodes(2 * steps))
    with pytest.raises(ValueError, match="only jumps to data"):
        ProgressiveStage(NOTHING, teacher=ConsistencyMap(net), teacher_grid=uniform_nodes(2))


def test_stage_steps() -> None:
    assert stage_steps(32, 1) == (16, 8, 4, 2, 1)
    assert stage_steps(12, 3) == (6, 3)
    assert stage_steps(2, 1) == (1,)
    with pytest.raises(ValueError, match="12 steps cannot be halved down to 1: 3 is odd"):
        stage_steps(12, 1)
    for start, end in ((8, 8), (4, 8), (8, 3), (1, 1)):
        with pytest.raises(ValueError, match=f"{start} steps cannot be halved down to {end}"):
            stage_steps(start, end)


def test_a_stage_serves_its_own_nodes() -> None:
    """Of a grid whose steps all differ, with nodes as they travel in float32."""
    grid = thinned(cosine_nodes(8), 4)
    domain = TimeDomain("grid", grid)
    for t, r in pairwise(torch.tensor(grid).tolist()):
        domain.check(t, r)
    for t, r in ((1.0, grid[2]), (1.0, 0.75), (grid[1], cosine_nodes(8)[3]), (0.25, 0.5), (0.0, -0.1)):
        with pytest.raises(ValueError, match="jump"):
            domain.check(t, r)


def test_a_state_of_another_grid_is_refused() -> None:
    """And one of before there were others counts as uniform."""

    def stage(grid: Grid) -> ProgressiveStage:
        return ProgressiveStage(nn.Identity(), teacher=SolverMap(LINE), teacher_grid=grid)

    state = stage(cosine_nodes(8)).extra_state()
    stage(cosine_nodes(8)).load_extra_state(state)
    for other in (uniform_nodes(8), cosine_nodes(4), shifted_nodes(8, 1.0001)):
        with pytest.raises(ValueError, match=r"on the nodes 1, 0\.70.*, and this stage has 1, "):
            stage(other).load_extra_state(state)
    stage(uniform_nodes(8)).load_extra_state({})
    with pytest.raises(ValueError, match="this stage has"):
        stage(cosine_nodes(8)).load_extra_state({})


def test_evaluations_of_a_solver_map() -> None:
    fields = (CLASSES, guided(CLASSES, 2.0, 3))
    counts = [SolverMap(teacher, solver).nfe for teacher in fields for solver in ("euler", "heun", "midpoint")]
    assert counts == [1, 2, 2, 2, 4, 4]
    assert SolverMap(CLASSES, "heun", 3).nfe == 6
