"""Progressive distillation with guidance as an input: the guided target in closed form, the same scale for a student
and its teacher, and one stage or two."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from fewstep.config import RunConfig, check_config
from fewstep.data.config import ToyConfig
from fewstep.data.dataset import Batch, Dataset
from fewstep.data.load import load_data
from fewstep.distill.flow_maps.guidance import GuidanceRange
from fewstep.distill.flow_maps.velocity import ContrastedField
from fewstep.distill.plan import plan
from fewstep.distill.progressive.objective import ProgressiveStage, SolverMap, Told, two_steps
from fewstep.distill.stage import Stage
from fewstep.errors import UsageError
from fewstep.flow import FlowMap, TimeDomain
from fewstep.grids import Grid, cosine_nodes, thinned, uniform_nodes
from fewstep.keys import Key
from fewstep.sampling import sample_map, sample_ode
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.teachers.guided import ClassContrast, GuidedField
from fewstep.teachers.load import Teacher, load_teacher

EXACT = {"rtol": 0.0, "atol": 1e-12}
KEY = Key(3, step=5)
MEANS, STDS = (0.8, -0.5), (0.5, 0.7)
"""Of the class, and of no class."""


class ClassAndNull:
    """Two Gaussians, so that the guided velocity is affine: label 0 is the class and 1 is none."""

    nfe = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        assert label_B is not None
        c, null = (GaussianTeacher(m, s)(x, t_B) for m, s in zip(MEANS, STDS, strict=True))
        return torch.where(label_B[:, None] == 0, c, null)


PAIR = ClassContrast(ClassAndNull(), 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, dtype=torch.float64)


def told_by(w: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.stack((w, torch.full_like(w, low), torch.full_like(w, high)), dim=1)


def by_hand(x: Tensor, grid: tuple[float, ...], w: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Guided Euler steps from the second implementation of the velocities."""
    state, scale = x.numpy().copy(), w.numpy()[:, None]
    for t, r in pairwise(grid):
        c, null = (oracle.gaussian_velocity(state, t, m, s) for m, s in zip(MEANS, STDS, strict=True))
        state = state + (r - t) * (null + (scale if low <= t <= high else 1.0) * (c - null))
    return torch.from_numpy(state)


class Noted(nn.Module):
    """A student that answers zero and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(
        self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None, guidance_B3: Tensor | None = None
    ) -> Tensor:
        self.calls.append((x, t_B, r_B, label_B, guidance_B3))
        return self.zero * x + (0.0 if guidance_B3 is None else 0.1 * guidance_B3[:, :1])


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.3, 0.8)])
def test_the_guided_target_in_closed_form(window: tuple[float, float]) -> None:
    """A stage on drawn scales: the student hears of each row's, and its target is two guided Euler steps with it."""
    net, n = Noted(), 60
    draws = GuidanceRange(1.0, *window, largest=4.0)
    jumps = SolverMap(ClassAndNull())
    told = Told(draws, lambda guidance_B3: SolverMap(ContrastedField(PAIR, guidance_B3)))
    stage = ProgressiveStage(net, teacher=jumps, teacher_grid=cosine_nodes(8), told=told, noise=double_noise)
    batch = Batch(normal(n, 1), torch.zeros(n, dtype=torch.int64), torch.arange(n))
    output = stage(batch, KEY)
    ((x, t, s, _, guidance),) = net.calls
    assert guidance is not None
    assert torch.equal(guidance, draws.draw(KEY, batch.index))
    assert float(guidance[:, 0].std()) > 0.3
    nodes = torch.tensor(cosine_nodes(8)).tolist()
    wanted = torch.empty_like(x)
    for b in range(n):
        i = nodes.index(float(t[b]))
        assert float(s[b]) == nodes[i + 2]
        end = by_hand(x[b : b + 1], tuple(nodes[i : i + 3]), guidance[b : b + 1, 0].double(), *window)
        wanted[b] = (x[b] - end[0]) / (nodes[i] - nodes[i + 2])
    residual = (0.1 * guidance[:, :1] - wanted).square().mean(dim=1)
    torch.testing.assert_close(output.residual_B.double(), residual.detach(), rtol=1e-5, atol=1e-6)


def double_noise(batch: Batch, key: Key) -> Tensor:
    return key.normal("noise", batch.index, (1,)).double()


def test_guidance_commutes_with_the_target_where_it_is_affine() -> None:
    """Models of one width: ``v*`` under ``w`` is ``v*(null) + w (v*(c) - v*(null))``. ``v*`` is linear in ``v``."""
    x, w = normal(30, 1), torch.linspace(0.5, 4, 30, dtype=torch.float64)
    c, null = GaussianTeacher(0.8, 0.5), GaussianTeacher(-0.5, 0.5)

    def pair(x: Tensor, t_B: Tensor, label_B: Tensor | None) -> tuple[Tensor, Tensor]:
        return c(x, t_B), null(x, t_B)

    def target(teacher: FlowMap) -> Tensor:
        return two_steps(teacher, x, at(0.9, x), at(0.7, x), at(0.2, x))

    v_c, v_null = target(SolverMap(c)), target(SolverMap(null))
    guided = target(SolverMap(ContrastedField(pair, told_by(w))))
    torch.testing.assert_close(guided, v_null + w[:, None] * (v_c - v_null), **EXACT)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
def test_a_scale_of_one_is_the_conditional_run(solver: Any) -> None:
    x, label = normal(30, 1), torch.zeros(30, dtype=torch.int64)
    jumps = (
        SolverMap(ClassAndNull(), solver),
        SolverMap(ContrastedField(PAIR, told_by(torch.ones(30).double())), solver),
    )
    plain, told = (two_steps(teacher, x, at(0.9, x), at(0.7, x), at(0.2, x), label) for teacher in jumps)
    torch.testing.assert_close(told, plain, **EXACT)
    other = SolverMap(ContrastedField(PAIR, told_by(torch.full((30,), 1.5).double())), solver)
    assert (two_steps(other, x, at(0.9, x), at(0.7, x), at(0.2, x), label) - plain).abs().min() > 0.01


class IdealStudent:
    """A student that learned its targets perfectly, under the guidance that its teacher is under."""

    nfe = 1

    def __init__(self, teacher: FlowMap, teacher_grid: Grid) -> None:
        self.teacher, self.teacher_grid = teacher, teacher_grid
        self.domain = TimeDomain("grid", teacher_grid[::2])

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        m = self.teacher_grid[self.teacher_grid.index(float(t_B[0])) + 1]
        return x - (t_B - r_B)[:, None] * two_steps(self.teacher, x, t_B, at(m, x), r_B, label_B)


@pytest.mark.parametrize("grid", [uniform_nodes(16), cosine_nodes(16)])
def test_a_chain_of_ideal_students_is_guided_euler(grid: Grid) -> None:
    """16 -> 1, every row under a scale of its own: as 16 guided Euler steps by hand, and as the guided field's."""
    e, label = normal(20, 1), torch.zeros(20, dtype=torch.int64)
    w = torch.linspace(1, 4, 20, dtype=torch.float64)
    teacher: FlowMap = SolverMap(ContrastedField(PAIR, told_by(w)))
    for steps in (8, 4, 2, 1):
        teacher = IdealStudent(teacher, thinned(grid, 2 * steps))
        nodes = torch.tensor(thinned(grid, steps), dtype=torch.float64)
        x = sample_map(teacher, e, nodes, label).x
        torch.testing.assert_close(x, by_hand(e, grid, w), **EXACT)
    for row in (0, 7, 19):
        one = slice(row, row + 1)
        field = GuidedField(PAIR, float(w[row]))
        many = sample_ode(field, e[one], torch.tensor(grid, dtype=torch.float64), label[one]).x
        torch.testing.assert_close(x[one], many, **EXACT)


# ------------------------------------------------------------------------------------------------------ from a config

GUIDED: dict[str, Any] = {
    "name": "guided",
    "data": {"kind": "toy", "name": "mixture_1d", "classes": True},
    "teacher": {"kind": "analytic"},
    "student": {
        "kind": "average_velocity",
        "init": "scratch",
        "network": {"kind": "mlp", "width": 8, "depth": 1},
        "guidance_input": True,
    },
    "objective": {"kind": "progressive", "start_steps": 8, "guidance": {"scale": 1.0, "largest": 4.0}},
    "train": {"steps": 10},
}


def config_of(student: dict[str, Any] | None = None, **objective: Any) -> RunConfig:
    tree = {
        **GUIDED,
        "objective": {**GUIDED["objective"], **objective},
        "student": {**GUIDED["student"], **(student or {})},
    }
    return check_config(tree, "the test")


def planned(config: RunConfig) -> tuple[tuple[Stage, ...], Teacher, Dataset]:
    assert isinstance(config.data, ToyConfig)
    assert config.teacher is not None
    data = load_data(config.data)
    teacher = load_teacher(config.teacher, config.data, data, torch.device("cpu"))
    return plan(config, teacher, data), teacher, data


def some(data: Dataset, n: int = 64) -> Batch:
    assert data.num_classes == 3
    return Batch(normal(n, *data.shape), torch.arange(n) % 3, torch.arange(n))


def heard(calls: list[Any]) -> Iterator[Tensor]:
    for call in calls:
        assert call[4] is not None
        yield call[4]


def test_later_stages_tell_the_teacher_what_they_tell_the_student() -> None:
    """The same scales in both of its steps and in the student's; every step of training draws others."""
    (first, second, third), _, data = planned(config_of())
    assert [stage.name for stage in (first, second, third)] == ["8 -> 4 steps", "4 -> 2 steps", "2 -> 1 steps"]
    drawn = []
    for stage in (second, third):
        student, previous = Noted(), Noted()
        stage.build(student, previous)(some(data), KEY)
        assert (len(student.calls), len(previous.calls)) == (1, 2)
        ours, theirs, again = heard([*student.calls, *previous.calls])
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, again)
        assert (float(ours[:, 0].min()), float(ours[:, 0].max())) == pytest.approx((1, 4), abs=0.3)
        drawn.append(ours)
        stage.build(student, previous)(some(data), Key(3, 6))
        assert not torch.equal(student.calls[-1][4], ours)
    assert torch.equal(*drawn)


def test_the_first_stage_guides_the_teacher_by_what_it_tells_the_student() -> None:
    (first, *_), teacher, data = planned(config_of())
    student, batch = Noted(), some(data)
    output = first.build(student, None)(batch, KEY)
    ((x, t, s, label, guidance),) = student.calls
    field = teacher.field
    assert isinstance(field, MixtureTeacher)
    assert guidance is not None

    def guided(x: Tensor, t_B: Tensor) -> Tensor:
        null = field(x, t_B)
        return null + guidance[:, :1] * (field(x, t_B, label) - null)

    gap = (t - s)[:, None]
    v1 = guided(x, t)
    v2 = guided(x - gap / 2 * v1, (t + s) / 2)
    wanted = (0.1 * guidance[:, :1] - (v1 + v2) / 2).square().mean(dim=1)
    torch.testing.assert_close(output.residual_B, wanted.to(output.residual_B), rtol=1e-4, atol=1e-5)


def test_two_stages() -> None:
    """First the guided velocity at all times, on the diagonal; then the halvings of what was learned, and of nothing
    else: the first of them takes Euler steps of the student before it, at equal times."""
    stages, teacher, data = planned(config_of(guidance_stages="two", weight="data"))
    assert [stage.name for stage in stages] == ["guided velocity", "8 -> 4 steps", "4 -> 2 steps", "2 -> 1 steps"]
    assert [(stage.steps, stage.serves) for stage in stages] == [(10, 4), (10, 4), (20, 2), (20, 1)]
    student, batch = Noted(), some(data, 600)
    output = stages[0].build(student, None)(batch, KEY)
    (x, t, r, label, guidance) = student.calls[-1]
    assert guidance is not None
    assert torch.equal(t, r)
    assert len(t.unique()) > 500
    null = teacher.field(x, t)
    wanted = 0.1 * guidance[:, :1] - (null + guidance[:, :1] * (teacher.field(x, t, label) - null))
    torch.testing.assert_close(
        output.residual_B, wanted.square().mean(dim=1).to(output.residual_B), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(output.per_sample_B, t**2 * output.residual_B)

    student, previous = Noted(), Noted()
    stages[1].build(student, previous)(batch, KEY)
    for _, t, r, _, told in previous.calls:
        assert torch.equal(t, r)
        assert told is not None
        assert torch.equal(told, student.calls[0][4])
    torch.testing.assert_close(previous.calls[1][1], (student.calls[0][1] + student.calls[0][2]) / 2)
    stages[2].build(student, previous)(batch, KEY)
    assert torch.equal(previous.calls[-2][1], student.calls[-1][1])
    assert not torch.equal(previous.calls[-2][1], previous.calls[-2][2])


def test_a_fixed_scale_in_a_window() -> None:
    """``objective.guidance`` without an input: the teacher is guided, the student hears of nothing."""
    config = config_of({"guidance_input": False}, guidance={"scale": 2.5, "low": 0.2, "high": 0.7})
    (first, *_), teacher, data = planned(config)
    student, batch = Noted(), some(data)
    objective = first.build(student, None)
    output = objective(batch, KEY)
    assert isinstance(objective, ProgressiveStage)
    ((x, t, s, label, guidance),) = student.calls
    assert guidance is None
    assert teacher.contrast is not None
    field = GuidedField(teacher.contrast, 2.5, 0.2, 0.7)
    wanted = two_steps(SolverMap(field), x, t, (t + s) / 2, s, label).square().mean(dim=1)
    torch.testing.assert_close(output.residual_B, wanted.to(output.residual_B))


def test_an_optimised_grid_is_of_the_guided_teacher() -> None:
    """Its nodes are the fine grid's, and guidance moves them; the same seed finds the same."""
    kind = {"kind": "optimised", "fine": 48, "samples": 32}
    grids = [
        planned(config_of({"guidance_input": False}, grid=kind, guidance=guidance))[0][0].grid
        for guidance in (None, {"scale": 6.0}, {"scale": 6.0})
    ]
    assert set(grids[0]) <= set(uniform_nodes(48))
    assert grids[0] != grids[1] == grids[2]
    assert grids[0] != uniform_nodes(4)


def test_a_teacher_without_classes_cannot_be_guided() -> None:
    tree = {**GUIDED, "data": {"kind": "toy", "name": "mixture_1d", "classes": False}}
    with pytest.raises(UsageError, match=r"objective\.guidance: .* neither classes nor a weaker one"):
        planned(check_config(tree, "the test"))


WRONG = {
    "two stages of nothing": ({}, {"guidance": None, "guidance_stages": "two"}, "guidance_stages two needs guidance"),
    "two stages of one scale": (
        {"guidance_input": False},
        {"guidance": {"scale": 2.0}, "guidance_stages": "two"},
        "set student.guidance_input",
    ),
    "an input of nothing": ({}, {"guidance": None}, "student.guidance_input needs objective.guidance"),
    "scales that nobody is told": ({"guidance_input": False}, {}, "objective.guidance.largest draws scales"),
    "guiding itself": ({}, {"guidance": {"scale": 2.0, "mix": 0.5}}, "guide themselves"),
    "a coarse fine grid": ({}, {"grid": {"kind": "optimised", "fine": 4}}, "fewer nodes than start_steps 8"),
    "an unknown grid": ({}, {"grid": {"kind": "cosin"}}, "did you mean 'cosine'?"),
    "an unknown weight": ({}, {"weight": "nois"}, "did you mean 'noise'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit(case: str) -> None:
    student, objective, says = WRONG[case]
    with pytest.raises(UsageError, match=r"^the test: ") as raised:
        config_of(student, **objective)
    assert says in str(raised.value)


def test_a_grid_too_fine_for_its_times() -> None:
    with pytest.raises(UsageError, match=r"objective\.grid: the nodes of a grid fall by 1e-05 or more"):
        planned(config_of(grid={"kind": "shifted", "shift": 1e6}))
