"""Every method of the flow-map family, built from its config: which networks it calls on which rows and how, what it
drops, reports and leaves alone, and that it trains.

A batch of 32 rows in two classes; 16 of them jump (or, for FreeFlow, 8 correct).
"""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from family import KEY, gradients
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fewstep.checkpoint import RunDirectory
from fewstep.config import check_config
from fewstep.data.config import ToyConfig
from fewstep.data.dataset import Batch, BatchSource
from fewstep.data.load import load_data
from fewstep.distill.config import TrainConfig
from fewstep.distill.couplings import gaussian_noise
from fewstep.distill.flow_maps.guidance import NO_GUIDANCE, GuidanceRange
from fewstep.distill.flow_maps.methods import METHODS, Given, objective_of
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.objective import LossOutput, Objective
from fewstep.distill.run import check_training
from fewstep.distill.tangent import OneSidedDifference
from fewstep.distill.train import make_accelerator, train
from fewstep.errors import UsageError
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.networks.dropout import Dropout, keyed_dropout
from fewstep.teachers.config import NoiseConfig
from fewstep.teachers.guided import ClassContrast
from fewstep.teachers.load import Teacher
from fewstep.teachers.network import NetworkField, freeze
from fewstep.times import jump_rows

B, CLASSES = 32, 2
Call = tuple[str, str]


def network(*, two_times: bool = True, seed: int = 0) -> nn.Module:
    net = build_network(MLPConfig(width=16, depth=1), (2,), CLASSES, two_times=two_times).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def batch(rows: slice = slice(0, B)) -> Batch:
    x = torch.randn(B, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.arange(B)
    return Batch(x[rows], (index % CLASSES)[rows], index[rows])


def build(
    kind: str, student: nn.Module | None = None, field: Any = None, done: float = 0.5, **settings: Any
) -> Objective:
    field = field or NetworkField(freeze(network(two_times=False, seed=1)))
    contrast = ClassContrast(field, CLASSES)
    teacher = Teacher("random", field, None, None, 1.0, "", 0, contrast=contrast)
    given = Given(student or network(), teacher, gaussian_noise, CLASSES, guidance_input=False, done=lambda step: done)
    return objective_of(tiny.KINDS[kind].model_validate({"kind": kind, **settings}), given)


HALF = {"jump_fraction": 0.5}
DIFFERENCE = {"jvp": "finite_difference"}
VALUE, DERIVATIVE, GRADIENT, BOTH = "value", "derivative", "gradient", "derivative with gradient"
DATA_GUIDED = {"velocity": "data", "guidance": {"scale": 2.0}}

COSTS: list[tuple[str, dict[str, Any], list[Call], list[str]]] = [
    ("meanflow", {}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], ["all"]),
    ("meanflow", {"velocity": "data"}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], []),
    ("meanflow", DIFFERENCE, [(VALUE, "jumps"), (VALUE, "jumps"), (GRADIENT, "all")], ["all"]),
    ("meanflow", {"jvp": "one_sided"}, [(VALUE, "jumps"), (GRADIENT, "all")], ["all"]),
    ("improved_meanflow", {"jvp": "one_sided"}, [(VALUE, "jumps"), (VALUE, "jumps"), (GRADIENT, "all")], []),
    (
        "meanflow",
        DATA_GUIDED,
        [(VALUE, "all, undropped"), (VALUE, "all, undropped"), (DERIVATIVE, "jumps"), (GRADIENT, "all")],
        [],
    ),
    (
        "meanflow",
        {"velocity": "data", "guidance": {"scale": 2.0, "mix": 0.0}},
        [(VALUE, "all, undropped"), (DERIVATIVE, "jumps"), (GRADIENT, "all")],
        [],
    ),
    ("improved_meanflow", {}, [(VALUE, "jumps"), (DERIVATIVE, "jumps"), (GRADIENT, "all")], []),
    ("modular_meanflow", {}, [(BOTH, "jumps"), (GRADIENT, "diagonal")], []),
    ("modular_meanflow", {"begin": 0.6}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], []),
    ("modular_meanflow", DIFFERENCE, [*3 * [(GRADIENT, "jumps")], (GRADIENT, "diagonal")], []),
    ("alpha_flow", {}, [(VALUE, "jumps"), (GRADIENT, "all")], []),
    ("alpha_flow", {"end": 0.4}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], []),
    ("soflow", {}, [(VALUE, "jumps"), (GRADIENT, "all")], []),
    ("split_meanflow", {}, [(VALUE, "jumps"), (VALUE, "jumps"), (GRADIENT, "all")], ["diagonal"]),
    ("split_meanflow", {"split": "half"}, [(VALUE, "jumps"), (VALUE, "jumps"), (GRADIENT, "all")], ["diagonal"]),
    ("shortcut", {}, [(VALUE, "jumps"), (VALUE, "jumps"), (GRADIENT, "all")], []),
    ("terminal_velocity", {}, [(BOTH, "jumps"), (VALUE, "jumps"), (GRADIENT, "diagonal")], []),
    ("terminal_velocity", {"target_decay": 0.0}, [(BOTH, "jumps"), (VALUE, "jumps"), (GRADIENT, "diagonal")], []),
    ("align_your_flow", {}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], ["all"]),
    ("align_your_flow", {"guidance": {"scale": 2.0}}, [(DERIVATIVE, "jumps"), (GRADIENT, "all")], ["all twice"]),
    (
        "align_your_flow",
        {"identity": "lagrangian"},
        [(BOTH, "jumps"), (GRADIENT, "diagonal")],
        ["diagonal", "jumps"],
    ),
]


class Log(list[tuple[str, Tensor, Tensor, Tensor | None, Tensor]]):
    """Shared by copies of a network."""

    def __deepcopy__(self, memo: object) -> "Log":
        return self


class Recorder(nn.Module):
    """A network with dropout that notes how it was called, at which times, whose activations it dropped, with which
    labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.dropout = Dropout(0.5)
        self.log = Log()

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        tangents = any(unpack_dual(value).tangent is not None for value in (x, t_B, r_B))
        graph = torch.is_grad_enabled()
        how = (BOTH if graph else DERIVATIVE) if tangents else (GRADIENT if graph else VALUE)
        self.log.append((how, unpack_dual(t_B).primal, unpack_dual(r_B).primal, self.dropout.seed_B, label_B))
        return self.dropout(self.net(x, t_B, r_B, label_B))


@pytest.mark.parametrize(("kind", "settings", "wanted", "of_teacher"), COSTS)
def test_what_a_step_calls(kind: str, settings: dict[str, Any], wanted: list[Call], of_teacher: list[str]) -> None:
    """Rows on the diagonal first; derivatives and targets on the others alone and without gradient, unless the gradient
    passes the derivative; one pass with gradient for all. And dropout: every call for a row drops what the row's output
    drops, but for velocities that stand for the data."""
    student, asked = Recorder(), []

    class Field:
        nfe = 1
        net = NetworkField(freeze(network(two_times=False, seed=1)))

        def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            assert not torch.is_grad_enabled()
            asked.append(len(x))
            return self.net(x, t, label)

    objective = build(kind, student, Field(), **HALF, **settings)
    output = objective(batch(), KEY)

    jump = jump_rows(torch.arange(B), 0.5)
    order = torch.argsort(jump.int(), stable=True)
    reference = Recorder()
    with keyed_dropout(reference, KEY, order):
        seeds = reference.dropout.seed_B
    rows = {"all": slice(0, B), "diagonal": slice(0, B // 2), "jumps": slice(B // 2, B)}
    assert [how for how, *_ in student.log] == [how for how, _ in wanted]
    for (how, t, r, seed, label), (_, which) in zip(student.log, wanted, strict=True):
        name, _, undropped = which.partition(", ")
        assert len(t) == len(seeds[rows[name]]), (how, which)
        if undropped:
            assert seed is None
        else:
            assert torch.equal(seed, seeds[rows[name]]), (how, which)
            lost = label == CLASSES  # some of the diagonal, where the student guides itself
            assert not lost.any() or "guidance" in settings
            assert torch.equal(label[~lost], (order % CLASSES)[rows[name]][~lost]), (how, which)
        if how == GRADIENT and name != "jumps":
            assert torch.equal(t[: B // 2], r[: B // 2])
            assert torch.equal(output.t_B[: B // 2], t[: B // 2])
            assert (t[B // 2 :] >= r[B // 2 :]).all()
    sizes = {"all": B, "diagonal": B // 2, "jumps": B // 2, "all twice": 2 * B}
    assert asked == [sizes[name] for name in of_teacher]


def test_what_a_step_of_free_flow_calls() -> None:
    """The derivative on the 24 rows that predict, one pass with gradient on all, the fake network on the other 8. The
    latter drops nothing."""
    student = Recorder()
    objective = build("free_flow", student)
    objective(batch(), KEY)
    assert [(how, len(t)) for how, t, *_ in student.log] == [(DERIVATIVE, 24), (GRADIENT, 32), (GRADIENT, 8)]
    first, second, third = (seed for _, _, _, seed, _ in student.log)
    assert torch.equal(first, second[:24])
    assert third is None
    own = objective.own_parameters()
    assert len(own) == len(list(student.parameters()))
    assert not {id(value) for value in own.values()} & {id(value) for value in student.parameters()}
    student.log.clear()
    build("free_flow", student, correction=0.0)(batch(), KEY)
    assert [(how, len(t)) for how, t, *_ in student.log] == [(DERIVATIVE, 32), (GRADIENT, 32)]
    student.log.clear()
    build("free_flow", student, correction=1.0)(batch(), KEY)
    assert [(how, len(t)) for how, t, *_ in student.log] == [(DERIVATIVE, 0), (GRADIENT, 32), (GRADIENT, 32)]


@pytest.mark.parametrize(("solver", "calls"), [("euler", 4), ("heun", 8)])
def test_what_a_step_of_trajectory_regression_calls(solver: str, calls: int) -> None:
    """Trajectories of four nodes: the teacher on 8 rows at a time, the student on 32."""
    student, asked = Recorder(), []

    def field(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        asked.append((len(x), label.tolist(), torch.is_grad_enabled()))
        return -x

    objective = build("trajectory", student, field, solver=solver, nodes=4)
    objective(batch(), KEY)
    assert [(how, len(t)) for how, t, *_ in student.log] == [(GRADIENT, 32)]
    assert student.log[0][3] is not None
    assert asked == calls * [(8, 8 * [0], False)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (kind, settings)
        for kind, settings in (
            ("meanflow", HALF),
            ("improved_meanflow", HALF),
            ("modular_meanflow", HALF),
            ("alpha_flow", {**HALF, "end": 0.4}),
            ("terminal_velocity", HALF),
            ("align_your_flow", HALF),
            ("align_your_flow", {**HALF, "identity": "lagrangian"}),
            ("free_flow", {}),
        )
    ],
)
def test_finite_differences_give_the_same(kind: str, settings: dict[str, Any]) -> None:
    """Losses and gradients, to the truncation error of the default step. Measured: 2e-4 at most."""
    results = []
    for jvp in ("forward", "finite_difference"):
        student = network()
        loss = build(kind, student, jvp=jvp, **settings)(batch(), KEY).per_sample_B
        results.append((loss.detach(), torch.cat([part.flatten() for part in gradients(loss.mean(), student)])))
    for ours, theirs in zip(*results, strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert 0 < error < 1e-3


@pytest.mark.parametrize("kind", ["meanflow", "improved_meanflow"])
def test_one_sided_differences_are_of_first_order(kind: str) -> None:
    """Loss and gradient: the error halves with the step. Measured: 1e-2 at the default step, or twice that."""
    results = []
    for settings in ({}, *({"jvp": "one_sided", "jvp_step": h} for h in (4e-3, 2e-3, 1e-3))):
        student = network()
        loss = build(kind, student, **HALF, **settings)(batch(), KEY).per_sample_B
        results.append((loss.detach(), torch.cat([part.flatten() for part in gradients(loss.mean(), student)])))
    exact, *found = results
    for which in (0, 1):
        errors = [float((each[which] - exact[which]).norm() / exact[which].norm()) for each in found]
        assert errors[0] < 0.1
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2, rel=0.1)


def test_one_sided_differences_take_the_output_as_their_other_point() -> None:
    """As with both points evaluated: the same loss and gradient, to rounding."""
    results = []
    for both in (False, True):
        student = network()
        objective = build("meanflow", student, **HALF, jvp="one_sided")
        assert isinstance(objective.derivative, OneSidedDifference)
        if both:
            objective.derivative = objective.derivative.__call__
        loss = objective(batch(), KEY).per_sample_B
        results.append((loss.detach(), torch.cat([part.flatten() for part in gradients(loss.mean(), student)])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


EVERY: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in METHODS if kind != "trajectory"),
    ("trajectory", {"nodes": 4}),
    ("meanflow", {**DATA_GUIDED, "weight": {"kind": "cauchy"}}),
    ("split_meanflow", {"target_decay": 0.9, "guidance": {"scale": 2.0}}),
    ("terminal_velocity", {"weight": {"kind": "log_variance"}, "target_decay": 0.0}),
    ("align_your_flow", {"identity": "lagrangian"}),
    ("alpha_flow", {"weight": {"kind": "power"}, "clip": 4.0}),
]
EACH = pytest.mark.parametrize(("kind", "settings"), EVERY)


def test_every_method_is_here() -> None:
    assert {kind for kind, _ in EVERY} == set(METHODS) == set(tiny.KINDS) <= set(tiny.OBJECTIVES)


@EACH
def test_it_trains(kind: str, settings: dict[str, Any]) -> None:
    """Three steps on two moons: losses are finite and weights move; the teacher is left as it was, and targets are no
    parameters."""
    data = load_data(ToyConfig(name="two_moons", count=200))
    student, teacher = network().float(), freeze(network(two_times=False, seed=1).float())
    before, frozen = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    objective = build(kind, student, NetworkField(teacher), **settings)
    targets = [copy.deepcopy(target.state_dict()) for target in objective.targets()]
    source = BatchSource(data, B, 0, device=torch.device("cpu"))
    config = TrainConfig(batch_size=B, lr=1e-2, warmup_steps=0)
    states = list(train(objective, source, config, make_accelerator(), seed=0, steps=3))
    assert len(states) == 3
    for state in states:
        assert torch.isfinite(torch.tensor([state.loss, state.grad_norm])).all()
        assert state.grad_norm > 0
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, frozen[name])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for target, old in zip(objective.targets(), targets, strict=True):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.parameters())
        assert any(not torch.equal(value, old[name]) for name, value in target.state_dict().items())
        assert not {id(p) for p in target.parameters()} & {id(p) for p in objective.parameters()}


@EACH
@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_does_not_matter(kind: str, settings: dict[str, Any], world: int) -> None:
    """The union of the ranks' losses is the single process's, as a set of rows."""
    objective = build(kind, **settings)
    whole: Tensor = objective(batch(), KEY).per_sample_B
    size = B // world
    parts = [objective(batch(slice(k * size, (k + 1) * size)), KEY).per_sample_B for k in range(world)]
    torch.testing.assert_close(torch.cat(parts).sort().values, whole.sort().values, rtol=1e-9, atol=1e-12)


DERIVATIVES = ("meanflow", "improved_meanflow", "modular_meanflow", "terminal_velocity", "align_your_flow")


@EACH
def test_what_it_reports(kind: str, settings: dict[str, Any]) -> None:
    """Numbers per sample, detached, NaN where they do not apply; the same names every time."""
    for done in (0.1, 0.5):
        objective = build(kind, done=done, **settings)
        output: LossOutput = objective(batch(), KEY)
        assert output.per_sample_B.shape == output.residual_B.shape == output.t_B.shape == (B,)
        assert output.per_sample_B.requires_grad
        assert not any(value.requires_grad for value in (output.residual_B, output.t_B, *output.diagnostics.values()))
        assert (output.residual_B > 0).all()
        found = output.diagnostics
        if kind == "trajectory":
            assert found == {}
            assert (output.t_B[::4] == 1).all()
            assert (output.t_B[1::4] < 1).all()
            continue
        if kind == "free_flow":
            assert set(found) == {"jvp_norm", "fake_residual"}
            assert found["jvp_norm"].isnan().tolist() == [False] * 24 + [True] * 8
            assert found["fake_residual"].isnan().tolist() == [True] * 24 + [False] * 8
            assert (output.t_B[24:] == 1).all()
            continue
        assert isinstance(objective, FlowMapMatching)
        assert set(found) == {"diagonal_residual", "jvp_norm"}
        straight = int((~jump_rows(torch.arange(B), objective.jump_fraction)).sum())
        head = [True] * straight + [False] * (B - straight)
        assert (~found["diagonal_residual"].isnan()).tolist() == head
        assert torch.equal(found["diagonal_residual"][:straight], output.residual_B[:straight])
        taken = kind in DERIVATIVES
        assert found["jvp_norm"].isnan().tolist() == (head if taken else [True] * B)


def test_no_jumps_and_only_jumps() -> None:
    """Every rule bears a batch without rows of either kind, as a microbatch may be."""
    for kind, settings, *_ in COSTS:
        student = Recorder()
        for fraction in (0.0, 1.0):
            objective = build(kind, student, **{**settings, "jump_fraction": fraction})
            loss = objective(batch(), KEY).per_sample_B
            assert torch.isfinite(loss).all()
            loss.mean().backward()


def test_what_defaults_differ_in() -> None:
    """The ingredients that make the methods, as their configs put them together."""
    assert build("align_your_flow", done=0.05).rule.factor(0.05) == pytest.approx(0.495)
    assert build("align_your_flow").rule.factor(0.5) == 0.99
    assert build("modular_meanflow").rule.factor(0.25) == 0.25
    assert build("soflow").rule.alpha(1.0) == pytest.approx(0.002)
    assert build("soflow").rule.alpha(0.0) == 0.1
    assert build("alpha_flow").rule.alpha(0.0) == 1
    assert build("alpha_flow").rule.alpha(1.0) == 0
    assert build("alpha_flow").rule.alpha(0.5) == 0.5
    assert build("alpha_flow", alpha=0.3).rule.alpha(0.9) == 0.3
    shortcut = build("shortcut", levels=3)
    assert (shortcut.rule.at, shortcut.rule.clip, shortcut.rule.finest) == ("half", 4.0, 0.25)
    assert (shortcut.target_decay, build("terminal_velocity").target_decay) == (0.999, 0.99)
    for kind in ("meanflow", "split_meanflow", "align_your_flow"):
        assert build(kind).target_decay == 0


def test_labels_are_lost_for_a_student_that_guides_itself() -> None:
    """At the rate asked for, on the diagonal alone; where a teacher guides, none are."""
    n = 20_000
    index = torch.arange(n)
    many = Batch(torch.zeros(n, 2), index % CLASSES, index)
    guided = {"guidance": {"scale": 2.0, "label_dropout": 0.2}}
    rows, straight = build("meanflow", velocity="data", jump_fraction=0.5, **guided).rows(many, KEY)
    order = torch.cat((index[::2], index[1::2]))
    lost = rows.label == CLASSES
    assert not lost[straight:].any()
    assert torch.equal(rows.label[~lost], (order % CLASSES)[~lost])
    assert float(lost[:straight].double().mean()) == pytest.approx(0.2, abs=4 * (0.16 / straight) ** 0.5)
    for settings in ({"velocity": "teacher", **guided}, {"velocity": "data"}):
        rows, _ = build("meanflow", jump_fraction=0.5, **settings).rows(many, KEY)
        assert torch.equal(rows.label, order % CLASSES)


def test_a_student_that_is_told_its_guidance() -> None:
    """Its scale and window as drawn; where its label is lost, that there is none."""
    objective = build("meanflow", velocity="data", jump_fraction=0.5, guidance={"scale": 2.0, "label_dropout": 0.5})
    objective.guidance = GuidanceRange(2.0, 0.1, 0.9, largest=4.0)
    rows, straight = objective.rows(batch(), KEY)
    lost = rows.label == CLASSES
    assert 2 < int(lost.sum()) < straight - 2
    drawn = objective.guidance.draw(KEY, rows.index)
    assert torch.equal(rows.guidance_B3[~lost], drawn[~lost])
    assert torch.equal(rows.guidance_B3[lost], torch.tensor(NO_GUIDANCE).expand(int(lost.sum()), 3))
    assert rows[straight:].guidance_B3.shape == (B - straight, 3)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"kind": "trajectory", "nodes": 6}, "objective.nodes"),
        ({"kind": "meanflow", "warm_start": {"steps": 1, "nodes": 6}}, "objective.warm_start.nodes"),
    ],
)
def test_microbatches_hold_whole_trajectories(settings: dict[str, Any], place: str, tmp_path: Path) -> None:
    tree = {
        "name": "toy",
        "data": {"kind": "toy", "name": "mixture_1d", "count": 100, "classes": False},
        "teacher": {"kind": "analytic"},
        "student": {"kind": "average_velocity", "init": "scratch", "network": {"kind": "mlp", "width": 8, "depth": 1}},
        "objective": settings,
        "train": {"steps": 2, "batch_size": 24},
    }

    def check(parts: int) -> None:
        tree["train"]["gradient_accumulation_steps"] = parts
        place, device = RunDirectory(tmp_path / "run"), torch.device("cpu")
        check_training(check_config(tree, "test"), place, device, processes=2, resume=False, overwrite=False)

    check(1)
    check(2)
    with pytest.raises(UsageError, match=rf"3 samples does not hold whole trajectories of {place} 6"):
        check(4)


def test_what_does_not_fit_is_refused() -> None:
    field = NetworkField(freeze(network(two_times=False)))
    bare = Teacher("bare", field, None, None, 1.0, "", 0)
    laplace = Teacher("laplace", field, None, None, 1.0, "", 0, noise=NoiseConfig(source="laplace"))

    def ask(teacher: Teacher | None, classes: int = CLASSES, **settings: Any) -> Objective:
        given = Given(network(), teacher, gaussian_noise, classes, guidance_input=False, done=lambda step: 0.0)
        return objective_of(tiny.KINDS[settings["kind"]].model_validate(settings), given)

    for kind in ("meanflow", "split_meanflow", "align_your_flow", "free_flow", "trajectory"):
        with pytest.raises(UsageError, match="needs a teacher block"):
            ask(None, kind=kind)
    with pytest.raises(UsageError, match="neither classes nor a weaker one"):
        ask(bare, kind="meanflow", guidance={"scale": 2.0})
    with pytest.raises(UsageError, match="needs classes, and the data have none"):
        ask(None, 0, kind="meanflow", **DATA_GUIDED)
    with pytest.raises(UsageError, match=r"correction needs Gaussian noise, the teacher's is laplace"):
        ask(laplace, kind="free_flow")
    ask(laplace, kind="free_flow", correction=0.0)
