"""MeanFlow: zero at the exact average velocity, its floor on data, its derivative, its gradient, its weight.

Float64 students on float32 times. Where a residual must be exact the times are multiples of 1/512, so that ``t - r`` is
exact too; on arbitrary times its rounding (6e-8) is what remains.
"""

import math

import family
import pytest
import torch
from family import GAUSSIAN, TEACHERS, ExactStudent, data, dyadic, gradients, random_batch, random_network
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MIXTURE_1D
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.objective import LossOutput
from fewstep.distill.tangent import Derivative, Net, forward_derivative
from fewstep.flow import VelocityField
from fewstep.keys import Key
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.times import Times, jump_rows, logit_normal, sample_times

KEY = Key(3, step=5)


def constant(time: float) -> Times:
    return lambda u: torch.full_like(u, time)


def meanflow(
    student: nn.Module,
    velocity: VelocityField | None,
    *,
    times: Times = dyadic,
    jump_fraction: float = 0.75,
    derivative: Derivative = forward_derivative,
    **weight: float,
) -> FlowMapMatching:
    return family.meanflow(student, velocity, times=times, jump_fraction=jump_fraction, derivative=derivative, **weight)


# --------------------------------------------------------------------------------------------- at the exact student


@TEACHERS
def test_exact_student_has_no_loss_under_the_teachers_velocity(teacher: GaussianTeacher | MixtureTeacher) -> None:
    """Sample by sample. Measured root residuals: 5e-16 (Gaussian), 4e-15 (mixture) on exact differences of times."""
    batch = data(teacher, 512)
    student = ExactStudent(teacher)
    loss = meanflow(student, teacher).forward(batch, KEY).per_sample_B
    assert loss.shape == (512,)
    assert float(loss.detach().max().sqrt()) < 1e-12

    _, t, r = student.seen
    assert int((r < t).sum()) == 384 - int((t[128:] == r[128:]).sum())
    assert float((t - r).max()) > 0.8
    loss = meanflow(student, teacher, times=logit_normal(-0.4, 1.0)).forward(batch, KEY).per_sample_B
    assert float(loss.detach().max().sqrt()) < 1e-6


@TEACHERS
@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_perturbed_student_has_loss_and_is_pulled_back(teacher: GaussianTeacher | MixtureTeacher, scale: float) -> None:
    """The residual of ``c u`` is ``(c - 1) v`` on every row, and descending the loss brings c towards one."""
    student = ExactStudent(teacher, scale)
    loss = meanflow(student, teacher).forward(data(teacher, 512), KEY).per_sample_B
    x, t, _ = student.seen
    torch.testing.assert_close(loss.detach(), ((scale - 1) * teacher(x, t))[:, 0].square(), rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(loss.mean(), student.scale)
    assert float(slope) * (scale - 1) > 0


def test_floor_of_the_loss_on_data() -> None:
    """With ``e - x`` in place of the marginal velocity the mean loss is ``s^2 sd_r^2 / sd_t^4`` (at t = 0.8, r = 0.3
    and s = 0.6: 0.2239), and only means vanish: E[residual] = 0, E[residual x_t] = 0. Four standard errors."""
    n, s = 200_000, 0.6

    def two_times(u: Tensor) -> Tensor:
        return torch.where(u < 0.5, 0.3, 0.8).double()

    student = ExactStudent(GAUSSIAN)
    objective = meanflow(student, None, times=two_times, jump_fraction=1.0)
    loss = objective.forward(data(GAUSSIAN, n), KEY).per_sample_B
    x, t, r = student.seen
    variance = {time: (1 - time) ** 2 * s**2 + time**2 for time in (0.3, 0.8)}
    floors = {(0.8, 0.3): 0.2239, (0.3, 0.3): s**2 / variance[0.3], (0.8, 0.8): s**2 / variance[0.8]}
    for (start, end), floor in floors.items():
        assert floor == pytest.approx(s**2 * variance[end] / variance[start] ** 2, rel=1e-3)
        rows = ((t - start).abs() < 1e-6) & ((r - end).abs() < 1e-6)
        count = int(rows.sum())
        assert count > n / 5
        assert float(loss.detach()[rows].mean()) == pytest.approx(floor, rel=4 * math.sqrt(2 / count) + 5e-4)
    # d loss / d shift is twice the residual, which is what must vanish in the mean.
    for weight in (torch.ones_like(x), x):
        (slope,) = torch.autograd.grad((loss * weight[:, 0]).mean(), student.shift, retain_graph=True)
        spread = math.sqrt(4 * float((loss.detach() * weight[:, 0].square()).mean()) / n)
        assert abs(float(slope)) < 4 * spread


# ---------------------------------------------------------------------------------------------- the total derivative


def test_total_derivative_is_a_central_difference() -> None:
    """Of u along (v, 1, 0), for a network with labels. Measured: 2e-9 at h = 1e-6 in float64."""
    net, batch = random_network(classes=4), random_batch(classes=4)
    x, label = batch.x, batch.label
    t = torch.linspace(0.2, 0.9, len(x), dtype=torch.float64)
    r = 0.4 * t
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    du_dt = forward_derivative(net, x, v, t, r, label)
    h = 1e-6
    with torch.no_grad():
        difference = (net(x + h * v, t + h, r, label) - net(x - h * v, t - h, r, label)) / (2 * h)
    assert not du_dt.requires_grad
    torch.testing.assert_close(du_dt, difference, rtol=0, atol=1e-6)
    assert du_dt.abs().mean() > 0.1


@TEACHERS
def test_identity_on_the_exact_map(teacher: GaussianTeacher | MixtureTeacher) -> None:
    """``u = v - (t - r) du/dt`` with the forward derivative, and by a difference along the flow."""
    e = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    one = torch.ones(101, dtype=torch.float64)
    t, r, h = 0.8 * one, 0.3 * one, 1e-5
    x = teacher.flow_map(e, one, t)
    u, v = teacher.average_velocity(x, t, r), teacher(x, t)
    du_dt = forward_derivative(ExactStudent(teacher), x, v, t, r, None)
    torch.testing.assert_close(u, v - 0.5 * du_dt, rtol=0, atol=1e-12)
    ahead, behind = (teacher.average_velocity(teacher.flow_map(x, t, t + d), t + d, r) for d in (h, -h))
    torch.testing.assert_close(u, v - 0.5 * (ahead - behind) / (2 * h), rtol=0, atol=1e-6)


@TEACHERS
@pytest.mark.parametrize("tangent", [0.0, -1.0], ids=["(v, 0)", "(v, -1)"])
def test_wrong_tangents_would_be_seen(teacher: GaussianTeacher | MixtureTeacher, tangent: float) -> None:
    """The control of the tests above: with another time tangent the exact student's residual is of order one."""

    @torch.no_grad()
    def wrong(net: Net, x: Tensor, v: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Tensor:
        tangents = (v, tangent * torch.ones_like(t_B))
        return torch.func.jvp(lambda x, t: net(x, t, r_B, label_B), (x, t_B), tangents)[1]

    objective = meanflow(ExactStudent(teacher), teacher, derivative=wrong)
    loss = objective.forward(data(teacher, 512), KEY).per_sample_B
    assert float(loss[128:].detach().mean().sqrt()) > 0.1


# -------------------------------------------------------------------------------------- against the paper's algorithm


def textbook(net: nn.Module, batch: Batch, velocity: VelocityField | None, fraction: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of 2505.13447 as printed: one joint jvp over the whole batch, gradient through its first output.

    Returns the loss per sample and the mask of jumping rows, both in the order of the batch.
    """
    e = KEY.normal("noise", batch.index, tuple(batch.x.shape[1:]))
    a, b = (sample_times(dyadic, KEY, purpose, batch.index) for purpose in ("time", "second_time"))
    jump = jump_rows(batch.index, fraction)
    t = torch.where(a > b, a, b)
    r = torch.where(jump, torch.where(a > b, b, a), t)
    z = (1 - t)[:, None] * batch.x + t[:, None] * e
    v = e - batch.x if velocity is None else velocity(z, t, batch.label)

    def u_of(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return net(z, t, r, batch.label)

    u, dudt = torch.func.jvp(u_of, (z, r, t), (v.to(z), torch.zeros_like(r), torch.ones_like(t)))
    u_tgt = v - (t - r)[:, None] * dudt
    return (u - u_tgt.detach()).square().mean(dim=1), jump


@pytest.mark.parametrize("velocity", [None, GaussianTeacher(0.2, 0.5)], ids=["data", "teacher"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_tail_jvp_is_the_textbook_algorithm(velocity: VelocityField | None, fraction: float) -> None:
    """Loss and gradient. The objective puts the diagonal rows first; nothing else differs. Measured: 1e-14."""
    net, batch = random_network(classes=4), random_batch(classes=4)
    wanted, jump = textbook(net, batch, velocity, fraction)
    output = meanflow(net, velocity, jump_fraction=fraction).forward(batch, KEY)
    torch.testing.assert_close(output.per_sample_B, torch.cat((wanted[~jump], wanted[jump])), rtol=0, atol=1e-6)
    pairs = zip(gradients(output.per_sample_B.mean(), net), gradients(wanted.mean(), net), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gradient_is_that_of_a_constant_target() -> None:
    """Nothing flows through the target: regress on frozen numbers ``v - (t - r) du/dt`` and get the same gradient."""
    net, batch = random_network(), random_batch()
    objective = meanflow(net, None)
    recorded: list[tuple[Tensor, ...]] = []
    handle = net.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments[:3]))
    loss = objective.forward(batch, KEY).per_sample_B
    handle.remove()
    x_t, t, r = recorded[-1]
    order = torch.argsort(jump_rows(batch.index, 0.75).int(), stable=True)
    v = KEY.normal("noise", batch.index[order], (3,)) - batch.x[order]
    target = v - (t - r)[:, None] * forward_derivative(net, x_t, v, t, r, None)
    mse = (net(x_t, t, r) - target).square().mean(dim=1)
    torch.testing.assert_close(loss, mse, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(gradients(loss.mean(), net), gradients(mse.mean(), net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_diagonal_rows_are_flow_matching() -> None:
    """At jump fraction 0 and a fixed time the losses and gradients are those of flow matching."""
    net, batch = random_network(), random_batch()
    ours = meanflow(net, None, times=constant(0.375), jump_fraction=0.0).forward(batch, KEY)
    flow_matching = FlowMatching(net, times=constant(0.375), label_dropout=0.0, null_label=0)
    theirs = flow_matching.forward(batch, KEY)
    torch.testing.assert_close(ours.per_sample_B, theirs.per_sample_B, rtol=1e-12, atol=0)
    grads = (gradients(output.per_sample_B.mean(), net) for output in (ours, theirs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_flow_matching_by_hand() -> None:
    """``|| v(x_t, t) - (e - x) ||^2 / D`` at both ends of a jump of no length, and the floor ``s^2 / sd_t^2``."""
    net, batch = random_network(), random_batch()
    e = KEY.normal("noise", batch.index, (3,))
    t = sample_times(dyadic, KEY, "time", batch.index)
    x_t = (1 - t)[:, None] * batch.x + t[:, None] * e
    wanted = (net(x_t, t, t) - e + batch.x).square().sum(dim=1) / 3
    loss = FlowMatching(net, times=dyadic, label_dropout=0.0, null_label=0).forward(batch, KEY).per_sample_B
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)

    n = 200_000
    objective = FlowMatching(ExactStudent(GAUSSIAN), times=constant(0.8), label_dropout=0.0, null_label=0)
    loss = objective.forward(data(GAUSSIAN, n), KEY).per_sample_B.detach()
    assert float(loss.mean()) == pytest.approx(0.5501, rel=4 * math.sqrt(2 / n) + 1e-4)


def test_labels_are_dropped_at_their_rate() -> None:
    """Each kept label stays where it was; the null label replaces a fifth of them, within four standard errors."""
    labels: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor) -> Tensor:
            labels.append(label_B)
            return x

    n = 20_000
    batch = Batch(torch.zeros(n, 1), torch.arange(n) % 10, torch.arange(n))
    FlowMatching(Recorder(), times=dyadic, label_dropout=0.2, null_label=10).forward(batch, KEY)
    (seen,) = labels
    dropped = seen == 10
    assert torch.equal(seen[~dropped], batch.label[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / n))


# ----------------------------------------------------------------------------------------------- weight and diagnostics


@pytest.mark.parametrize("power", [0.5, 0.75, 1.0])
def test_adaptive_weight(power: float) -> None:
    """``||Delta||^2 / sg(||Delta||^2 + c)^p`` with the norm summed over coordinates, as value and as gradient."""
    net, batch, c = random_network(), random_batch(), 0.3
    plain = meanflow(net, None).forward(batch, KEY).per_sample_B
    square = 3 * plain
    weight = ((square + c) ** -power).detach()
    output = meanflow(net, None, weight_power=power, weight_offset=c).forward(batch, KEY)
    torch.testing.assert_close(output.per_sample_B, weight * square, rtol=1e-12, atol=0)
    pairs = zip(gradients(output.per_sample_B.mean(), net), gradients((weight * square).mean(), net), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert float(output.residual_B.mean()) == pytest.approx(float(plain.detach().mean()), rel=1e-12)


def test_weight_by_hand() -> None:
    """A student of zeros: Delta = -(e - x), so p = 1 and c = 1 gives S / (S + 1) and p = 0 gives S / D."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x)

    batch = random_batch()
    S = (KEY.normal("noise", batch.index, (3,)) - batch.x).square().sum(dim=1)
    for power, wanted in ((0.0, S / 3), (1.0, S / (S + 1)), (0.5, S / (S + 1).sqrt())):
        objective = meanflow(Zero(), None, jump_fraction=0.0, weight_power=power, weight_offset=1.0)
        torch.testing.assert_close(objective.forward(batch, KEY).per_sample_B, wanted, rtol=1e-12, atol=0)


def shares(fraction: float) -> tuple[Tensor, Tensor, LossOutput]:
    """Times and losses of a network at a jump fraction, in the objective's order of rows."""
    net = random_network()
    seen: list[tuple[Tensor, ...]] = []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    output = meanflow(net, None, jump_fraction=fraction).forward(random_batch(64), KEY)
    return seen[-1][1], seen[-1][2], output


def test_jump_fraction_zero_and_one() -> None:
    """No row jumps, or every row may; a diagnostic is NaN where it does not apply."""
    t, r, output = shares(0.0)
    assert torch.equal(t, r)
    assert torch.equal(output.diagnostics["diagonal_residual"], output.per_sample_B.detach())
    assert output.diagnostics["jvp_norm"].isnan().all()
    t, r, output = shares(1.0)
    assert (r <= t).all()
    assert int((r < t).sum()) >= 62
    assert output.diagnostics["diagonal_residual"].isnan().all()
    assert torch.equal(output.residual_B, output.per_sample_B.detach())


def test_diagnostics_between() -> None:
    """Of 64 rows at fraction 1/4 the first 48 lie on the diagonal."""
    t, r, output = shares(0.25)
    assert torch.equal(output.t_B, t)
    assert torch.equal(t[:48], r[:48])
    assert (r[48:] < t[48:]).sum() >= 15
    on_diagonal, jvp_norm = output.diagnostics["diagonal_residual"], output.diagnostics["jvp_norm"]
    assert torch.equal(on_diagonal[:48], output.residual_B[:48])
    assert on_diagonal[48:].isnan().all()
    assert jvp_norm[:48].isnan().all()
    assert (jvp_norm[48:] > 0).all()


def test_jumps_are_sorted_pairs_of_independent_times() -> None:
    """t and r are the larger and the smaller of two draws: E = 2/3 and 1/3 for uniform times."""
    student = ExactStudent(GAUSSIAN)
    n = 20_000
    meanflow(student, GAUSSIAN, jump_fraction=1.0).forward(data(GAUSSIAN, n), KEY)
    _, t, r = student.seen
    for times, mean in ((t, 2 / 3), (r, 1 / 3)):
        assert float(times.double().mean()) == pytest.approx(mean, abs=4 * math.sqrt(1 / 18 / n))


@pytest.mark.parametrize("world", [2, 4])
def test_loss_does_not_depend_on_the_number_of_processes(world: int) -> None:
    """The union of the ranks' losses is the single process's, as a set of rows (each rank sorts its own)."""
    net, batch = random_network(classes=4), random_batch(classes=4)
    objective = meanflow(net, None, jump_fraction=0.25)

    def part(rows: Tensor) -> Batch:
        return Batch(batch.x[rows], batch.label[rows], batch.index[rows])

    whole: Tensor = objective.forward(batch, KEY).per_sample_B
    split = [objective.forward(part(rows), KEY).per_sample_B for rows in torch.arange(24).chunk(world)]
    torch.testing.assert_close(torch.cat(split).sort().values, whole.sort().values, rtol=1e-9, atol=0)


def test_labels_travel_with_their_rows() -> None:
    """Through the reordering: an exact conditional student has no loss."""
    teacher = MixtureTeacher.from_spec(MIXTURE_1D)
    index = torch.arange(96)
    label = index % 3
    batch = Batch(teacher.sample(Key(1), index, label).double(), label, index)
    loss = meanflow(ExactStudent(teacher), teacher).forward(batch, KEY).per_sample_B
    assert float(loss.detach().max().sqrt()) < 1e-12
