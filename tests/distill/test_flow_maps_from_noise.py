"""The methods that need no data, in closed form: FreeFlow's correction and its fake velocity, the teacher's own
trajectories. (What their exact students leave is in ``test_flow_maps.py``.)"""

import math

import numpy as np
import pytest
import torch
from family import (
    GAUSSIAN,
    KEY,
    LINE,
    Exact,
    ExactStudent,
    ExactTrajectories,
    data,
    deltas,
    double_noise,
    dyadic,
    free_flow,
    root,
)

from fewstep.data.dataset import Batch
from fewstep.data.toys import MIXTURE_1D
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher


def trajectories(teacher: Exact, solver: str, nodes: int) -> TrajectoryRegression:
    return TrajectoryRegression(ExactStudent(teacher), teacher=teacher, solver=solver, nodes=nodes, noise=double_noise)


def test_free_flow_without_data() -> None:
    """Of the batch only places and labels count."""
    batch = data(GAUSSIAN, 64)
    objective = free_flow(ExactStudent(LINE, 0.9), LINE, correction=0.25)
    losses = [
        objective(Batch(x, None, batch.index), KEY).per_sample_B for x in (batch.x, torch.full_like(batch.x, torch.nan))
    ]
    assert torch.equal(*losses)


def test_free_flow_corrects_where_samples_land() -> None:
    """Rows that correct come last and jump to data. Where the fake velocity is the samples' own and the samples are as
    the data, nothing moves. Where samples are shifted by b, the difference of the two data predictions is ``-b q^2 /
    sd_q^2`` over its scale: samples move back, whatever the sign."""
    batch, s = data(GAUSSIAN, 4000), 0.6
    for b in (0.0, 0.2, -0.2):
        student = ExactStudent(GAUSSIAN)
        student.shift.data -= b  # samples are z - u
        objective = free_flow(student, GAUSSIAN, correction=0.25)
        objective.fake = ExactStudent(GaussianTeacher(0.4 + b, s))
        delta, _, t, r = deltas(objective, batch)
        assert (t == 1).all()
        assert (r[3000:] == 0).all()
        assert (r[:3000] > 0).all()
        index = batch.index[3::4]  # at 1/4 every fourth row corrects
        q = dyadic(KEY.uniform("renoise_time", index))
        xhat = GAUSSIAN.flow_map(double_noise(batch, KEY)[3::4], torch.ones_like(q), 0 * q) + b
        x_q = (1 - q)[:, None] * xhat + q[:, None] * KEY.normal("renoise", index, (1,))
        predicted = x_q - q[:, None] * GAUSSIAN(x_q, q)
        away = -b * (q / ((1 - q) ** 2 * s**2 + q**2) * q)[:, None]
        move = away / (xhat - predicted).abs().clamp_min(1e-6)
        assert (move * b <= 0).all()
        torch.testing.assert_close(delta.detach()[3000:], move, rtol=1e-6, atol=1e-9)


def test_free_flow_trains_its_fake_velocity_by_flow_matching() -> None:
    """On the student's samples, through the fake network alone: at its own velocity the slope of the loss in scale and
    shift is zero within four standard errors, and not at the data's; the student's gradient is that without it."""
    batch, fakes = data(GAUSSIAN, 40_000), (GaussianTeacher(0.7, 0.6), GAUSSIAN)
    for fake, fits in zip(fakes, (True, False), strict=True):
        student = ExactStudent(GAUSSIAN)
        student.shift.data -= 0.3
        objective = free_flow(student, GAUSSIAN, correction=1.0, correction_weight=1e-9)
        objective.fake = ExactStudent(fake)
        output = objective(batch, KEY)
        loss = output.per_sample_B
        (by_shift,) = torch.autograd.grad(loss.mean(), objective.fake.shift, retain_graph=True)
        error = 2 * math.sqrt(float(output.diagnostics["fake_residual"].mean()) / len(loss))
        assert (abs(float(by_shift)) < 4 * error) == fits
        gradient = torch.autograd.grad(loss.mean(), (student.scale, student.shift))
        assert max(abs(float(value)) for value in gradient) < 1e-6
        assert output.diagnostics["jvp_norm"].isnan().all()
        torch.testing.assert_close(loss.detach(), output.diagnostics["fake_residual"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_trajectories_have_the_error_of_their_solver(solver: str, order: int) -> None:
    """Of the mixture, at 16, 32 and 64 nodes: orders to 0.25."""
    errors = []
    for nodes in (16, 32, 64):
        delta, _, _, _ = deltas(trajectories(LINE, solver, nodes), data(LINE, 1024))
        errors.append(root(delta))
    assert -np.polyfit(np.log((16, 32, 64)), np.log(errors), 1)[0] == pytest.approx(order, abs=0.25)


def test_trajectories_cover_all_pairs() -> None:
    """Nodes fall from 1 to 0 in even steps from an offset of each trajectory's own; the i-th sample of a trajectory
    starts at its i-th node, and its end is any of the later ones, evenly."""
    nodes, n = 4, 40_000
    objective = trajectories(GAUSSIAN, "heun", nodes)
    times = objective.times(KEY, torch.arange(0, n, nodes))
    assert times.shape == (n // nodes, nodes + 1)
    assert (times[:, 0] == 1).all()
    assert (times[:, -1] == 0).all()
    assert (times.diff(dim=1) <= 0).all()
    torch.testing.assert_close(times[:, 1:-1].diff(dim=1), torch.full((n // nodes, 2), -1 / 3), rtol=0, atol=1e-6)
    inner = times[:, 1:-1].flatten()
    for bound in (0.1, 0.25, 0.5, 0.9):
        assert float((inner < bound).double().mean()) == pytest.approx(bound, abs=4 * math.sqrt(0.25 / (n // nodes)))
    _, _, t, r = deltas(objective, data(GAUSSIAN, n))
    assert torch.equal(t.reshape(-1, nodes), times[:, :-1])
    for i in range(nodes):
        ends = [float((r[i::nodes] == times[:, j]).double().mean()) for j in range(i + 1, nodes + 1)]
        assert ends == pytest.approx([1 / (nodes - i)] * (nodes - i), abs=4 * math.sqrt(0.25 / (n // nodes)))


def test_the_smallest_trajectory() -> None:
    """Two nodes: one in the middle, anywhere."""
    objective = trajectories(GAUSSIAN, "heun", 2)
    times = objective.times(KEY, torch.arange(0, 8, 2))
    assert ((times[:, 1] > 0) & (times[:, 1] < 1)).all()
    assert float(times[:, 1].std()) > 0.05


def test_trajectories_are_solved_in_full_precision() -> None:
    """Of two close states: a teacher that autocast would reach gives what it gives without."""
    torch.manual_seed(0)
    teacher = torch.nn.Linear(4, 4)
    objective = TrajectoryRegression(
        torch.nn.Identity(), teacher=lambda x, t, label: teacher(x), solver="heun", nodes=4, noise=double_noise
    )
    e, times = torch.randn(8, 4), objective.times(KEY, torch.arange(0, 32, 4))
    wanted = objective.solve(e, times, None)
    assert not wanted.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.solve(e, times, None), wanted)


def test_labels_travel() -> None:
    """An exact conditional student has no residual: a trajectory is of its first sample's class, and FreeFlow's rows
    keep their own, whichever of them correct."""
    teacher = MixtureTeacher.from_spec(MIXTURE_1D)
    index = torch.arange(96)
    batch = Batch(torch.zeros(96, 1, dtype=torch.float64), index % 3, index)
    exact = ExactTrajectories(ExactStudent(teacher), teacher=teacher, solver="euler", nodes=4, noise=double_noise)
    assert root(deltas(exact, batch)[0]) < 1e-6
    objective = free_flow(ExactStudent(teacher), teacher, correction=0.25)
    objective.fake = ExactStudent(teacher)
    seen: list[torch.Tensor] = []
    objective.student.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[3]))
    assert float(deltas(objective, batch)[0].detach().abs().max()) < 1e-12
    order = torch.cat((index[index % 4 != 3], index[index % 4 == 3]))
    assert torch.equal(seen[-1], order % 3)
