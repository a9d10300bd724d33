"""Trajectory regression: which row starts where, and that the target is the teacher's own average velocity."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MixtureSpec
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.flow import VelocityField, expand
from fewstep.keys import Key
from fewstep.sampling import SOLVERS, Solver, Step
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher

KEY = Key(3, step=5)
GAUSSIAN = GaussianTeacher(0.4, 0.6)
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.4, 0.6), means=((-0.7,), (0.6,)), stds=(0.5, 0.4)))


def double_noise(batch: Batch, key: Key) -> Tensor:
    return key.normal("noise", batch.index, tuple(batch.x.shape[1:])).double()


class Recorder(nn.Module):
    """Answers with zeros, so that ``delta`` is the target with its sign turned; keeps what it is asked."""

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.x, self.t, self.r, self.label = x, t_B, r_B, label_B
        return torch.zeros_like(x)


class Kept:
    """The plain weight, keeping what it is given."""

    def __call__(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        self.target = -delta
        self.times = (t_B, r_B)
        return plain(delta, t_B, r_B)


def points(count: int = 32, dimensions: int = 1, classes: int = 0) -> Batch:
    index = torch.arange(count)
    x = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(x, index % classes if classes else None, index)


def asked(
    teacher: VelocityField, batch: Batch, *, nodes: int = 8, solver: Solver = "euler", key: Key = KEY
) -> tuple[Recorder, Kept]:
    net, weight = Recorder(), Kept()
    regression = TrajectoryRegression(
        net, teacher=teacher, solver=solver, nodes=nodes, weight=weight, noise=double_noise
    )
    output = regression(batch, key)
    torch.testing.assert_close(output.residual_B, plain(weight.target, net.t, net.r), rtol=1e-12, atol=0)
    assert output.t_B is net.t
    assert weight.times == (net.t, net.r)
    return net, weight


# --------------------------------------------------------------------------------------------------------------- times


def nodes_of(count: int, groups: int, key: Key = KEY) -> Tensor:
    regression = TrajectoryRegression(Recorder(), teacher=GAUSSIAN, solver="euler", nodes=count)
    return regression.times(key, torch.arange(groups) * count)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_nodes_run_from_noise_to_data(count: int) -> None:
    """``1 - (k - 1 + a) / (N - 1)`` between the ends, with an ``a`` of its own on (0, 1) for each trajectory."""
    times = nodes_of(count, 500)
    assert times.shape == (500, count + 1)
    assert times.dtype == torch.float32
    assert (times[:, 0] == 1).all()
    assert (times[:, -1] == 0).all()
    assert (times[:, 1:] < times[:, :-1]).all()
    offset = (1 - times[:, 1].double()) * (count - 1)
    assert scipy.stats.kstest(offset.numpy(), "uniform").statistic < 1.95 / math.sqrt(500)
    inner = 1 - (torch.arange(count - 1) + offset[:, None]) / (count - 1)
    torch.testing.assert_close(times[:, 1:-1].double(), inner, rtol=0, atol=1e-6)
    # All trajectories together leave no time out: their inner nodes are uniform on (0, 1).
    assert scipy.stats.kstest(times[:, 1:-1].flatten().numpy(), "uniform").statistic < 1.95 / math.sqrt(500)


def test_nodes_are_keyed() -> None:
    times = nodes_of(4, 10)
    regression = TrajectoryRegression(Recorder(), teacher=GAUSSIAN, solver="euler", nodes=4)
    assert torch.equal(regression.times(KEY, torch.tensor([12, 4])), times[[3, 1]])
    for key in (Key(4, 5), Key(3, 6)):
        assert not torch.equal(nodes_of(4, 10, key)[:, 1], times[:, 1])


def test_row_i_starts_at_node_i() -> None:
    """Of the trajectory that eight neighbours share, and ends at a later one."""
    net, _ = asked(GAUSSIAN, points(64))
    times = nodes_of(8, 8)
    for b in range(64):
        group, i = divmod(b, 8)
        assert net.t[b] == times[group, i]
        assert net.r[b] in times[group, i + 1 :]


def test_ends_are_any_later_node() -> None:
    """Evenly: chi-square of the counts of each start below its 0.1 % point."""
    groups, nodes = 2000, 4
    net, _ = asked(GAUSSIAN, points(groups * nodes), nodes=nodes)
    times = nodes_of(nodes, groups)
    end = (net.r.reshape(groups, nodes, 1) == times[:, None]).double().argmax(dim=-1)
    for i in range(nodes):
        counts = torch.stack([(end[:, i] == j).sum() for j in range(nodes + 1)])
        assert not counts[: i + 1].any()
        expected = groups / (nodes - i)
        statistic = float(((counts[i + 1 :] - expected) ** 2 / expected).sum())
        assert statistic < (scipy.stats.chi2.isf(1e-3, nodes - i - 1) if i < nodes - 1 else 1e-9)


# -------------------------------------------------------------------------------------------------------------- target


class Straight:
    """The flow of data that are one point for each class: straight lines, on which Euler's method is exact."""

    nfe = 1
    at = torch.tensor([[-1.0, 0.5], [0.3, 2.0], [1.5, -0.7]], dtype=torch.float64)

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        assert (t_B > 0).all()
        where = self.at[:1] if label_B is None else self.at[label_B]
        return (x - where) / expand(t_B, x)


@pytest.mark.parametrize("classes", [0, 3])
def test_on_straight_lines_the_target_is_the_line(classes: int) -> None:
    """``e - x_0`` for all jumps of a trajectory, ``e`` and the class being those of its first sample. States lie on the
    line as well."""
    batch = points(48, 2, classes)
    net, weight = asked(Straight(), batch)
    e = double_noise(batch, KEY)[::8].repeat_interleave(8, dim=0)
    label = None if batch.label is None else batch.label[::8].repeat_interleave(8)
    data = Straight.at[:1] if label is None else Straight.at[label]
    torch.testing.assert_close(weight.target, e - data, rtol=0, atol=1e-5)  # float32 times
    t = net.t[:, None]
    torch.testing.assert_close(net.x, (1 - t) * data + t * e, rtol=0, atol=1e-5)
    if classes:
        assert torch.equal(net.label, label)  # type: ignore[arg-type]
        assert not torch.equal(label, batch.label)  # type: ignore[arg-type]
    else:
        assert net.label is None


def test_an_exact_solver_gives_the_exact_average_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the nodes: here every step of the solver is the flow map of the mixture. A student that knows it has no
    loss, and one that is 10 % off has."""

    def exact(field: VelocityField, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Step:
        return Step(LINE.flow_map(x, t_B, r_B), calls=1)

    monkeypatch.setitem(SOLVERS, "euler", exact)
    net, weight = asked(LINE, points(64))
    wanted = LINE.average_velocity(net.x, net.t, net.r)
    torch.testing.assert_close(weight.target, wanted, rtol=0, atol=1e-11)
    assert (wanted - LINE(net.x, net.t)).abs().max() > 0.1


class Exact(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return self.scale * LINE.average_velocity(x, t_B, r_B)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_the_targets_error_is_the_solvers(solver: Solver, order: int) -> None:
    """The root of the exact map's loss falls as ``N^-p``, on a mixture; 16 to 128 nodes, tolerance .15."""
    counts, errors = np.array([16, 32, 64, 128]), []
    for nodes in counts:
        regression = TrajectoryRegression(Exact(), teacher=LINE, solver=solver, nodes=int(nodes), noise=double_noise)
        errors.append(math.sqrt(float(regression(points(2048), KEY).per_sample_B.detach().mean())))
    assert errors[-1] < 0.02
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


def test_a_student_that_is_off_is_pulled_back() -> None:
    for scale in (0.9, 1.1):
        net = Exact(scale)
        loss = TrajectoryRegression(net, teacher=LINE, solver="heun", nodes=32, noise=double_noise)(
            points(256), KEY
        ).per_sample_B.mean()
        (slope,) = torch.autograd.grad(loss, net.scale)
        assert float(slope) * (scale - 1) > 0


# ------------------------------------------------------------------------------------------------- what it depends on


def test_data_do_not_matter() -> None:
    batch = points(32, 2)
    net, weight = asked(GaussianTeacher(0.4, 0.6), batch)
    moved = Batch(batch.x.flip(0) * 3 + 1, None, batch.index)
    other, also = asked(GaussianTeacher(0.4, 0.6), moved)
    for one, two in ((net.x, other.x), (net.t, other.t), (net.r, other.r), (weight.target, also.target)):
        assert torch.equal(one, two)
    assert asked(GAUSSIAN, batch, key=Key(3, 6))[0].x.ne(net.x).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_shares_of_a_batch_are_its_rows(parts: int) -> None:
    """For every microbatch of whole groups."""
    batch = points(32, 2, classes=3)
    net, weight = asked(Straight(), batch)
    found = []
    for rows in torch.arange(32).chunk(parts):
        assert batch.label is not None
        one, also = asked(Straight(), Batch(batch.x[rows], batch.label[rows], batch.index[rows]))
        found.append((one.x, one.t, one.r, one.label, also.target))
    for whole, split in zip((net.x, net.t, net.r, net.label, weight.target), zip(*found, strict=True), strict=True):
        assert torch.equal(torch.cat(split), whole)  # type: ignore[arg-type]


def test_the_teacher_is_asked_once_per_step_for_a_whole_group() -> None:
    """``N`` steps serve ``N`` rows; without gradient, in full precision."""
    calls: list[int] = []

    class Counting(nn.Module):
        nfe = 1

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            calls.append(len(x))
            return self.gain * x

    with torch.autocast("cpu", torch.bfloat16):
        net, weight = asked(Counting(), points(32), nodes=8)
    assert calls == 8 * [4]
    assert not weight.target.requires_grad
    assert net.x.shape == (32, 1)


@pytest.mark.parametrize("weight", [plain, lambda delta, t, r: t * plain(delta, t, r)])
def test_any_weight(weight: Weight | Callable[..., Tensor]) -> None:
    output = TrajectoryRegression(Exact(1.1), teacher=LINE, solver="euler", nodes=8, weight=weight, noise=double_noise)(
        points(), KEY
    )
    factor = output.t_B if weight is not plain else 1
    torch.testing.assert_close(output.per_sample_B.detach(), factor * output.residual_B, rtol=1e-12, atol=0)
    assert output.diagnostics == {}
