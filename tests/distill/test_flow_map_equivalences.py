"""How the methods of the flow-map family go over into each other, and into their papers' losses as printed. Random
networks in float64, so that what is equal is equal to rounding, and what is a limit shows its order.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from family import KEY, double_noise, double_pairs, dyadic, gradients, matching, random_batch, random_network
from torch import Tensor, nn

from fewstep.distill.flow_maps.free_flow import FreeFlow
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rows import Rows
from fewstep.distill.flow_maps.rules import Discrete, Eulerian, Goal, Lagrangian, Modulated, Rule, Setting, Split
from fewstep.distill.flow_maps.schedules import Constant, Ramp
from fewstep.distill.flow_maps.velocity import ContrastedVelocity, SelfGuided, TeacherVelocity, conditional, diagonal
from fewstep.distill.flow_maps.weights import AdaptivePower, NormalisedTangent
from fewstep.distill.progressive.objective import two_steps
from fewstep.distill.tangent import end_derivative, forward_derivative, path_derivative
from fewstep.flow import expand
from fewstep.students.maps import AverageVelocityMap
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.guided import ClassContrast, guided

TEACHER = GaussianTeacher(0.2, 0.5)
SOURCES = pytest.mark.parametrize("velocity", [conditional, TeacherVelocity(TEACHER)], ids=["data", "teacher"])
B, D = 24, 3


def some_rows() -> Rows:
    """States, velocities and jumps of a length of 0.2 or more."""
    generator = torch.Generator().manual_seed(4)
    x, v = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
    t = 0.4 + 0.6 * torch.rand(B, generator=generator, dtype=torch.float64)
    r = (t - 0.2) * torch.rand(B, generator=generator, dtype=torch.float64)
    return Rows(x, t, r, None, v, torch.arange(B))


class Fixed:
    """In the place of a key: the same number for every sample."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, purpose: str, index: Tensor) -> Tensor:
        assert purpose == "split"
        return torch.full((len(index),), self.value, dtype=torch.float64)


def setting(net: nn.Module, v: Tensor | None = None, done: float = 0.0, key: object = KEY) -> Setting:
    return Setting(v, net, forward_derivative, key, done)


def outcome(rule: Rule, net: nn.Module, rows: Rows, v: Tensor | None = None, **changes: object) -> Tensor:
    """``Delta`` of some rows under a rule."""
    goal: Goal = rule(net, rows, setting(net, v, **changes))
    assert not goal.target.requires_grad
    u = net(rows.x, rows.t, rows.r) if goal.prediction is None else goal.prediction
    return (u - goal.target) / goal.share


def meanflow_residual(net: nn.Module, rows: Rows, w: Tensor, v: Tensor) -> Tensor:
    """``u - v + (t - r) du/dt|_w``, the derivative by a central difference of 1e-5."""
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (net(rows.x + d * w, rows.t + d, rows.r) for d in (h, -h))
        u = net(rows.x, rows.t, rows.r)
    return u - v + expand(rows.t - rows.r, u) * (ahead - behind) / (2 * h)


def order(steps: Sequence[float], errors: Sequence[Tensor | float]) -> float:
    return float(np.polyfit(np.log(steps), np.log([float(torch.as_tensor(error).detach()) for error in errors]), 1)[0])


def same_gradients(ours: Tensor, theirs: Tensor, net: nn.Module, tolerance: float = 1e-12) -> None:
    for a, b in zip(gradients(ours, net), gradients(theirs, net), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def distance(ours: Tensor, theirs: Tensor, net: nn.Module) -> float:
    """Of two gradients, relative to the second."""
    a, b = (torch.cat([part.flatten() for part in gradients(loss, net)]) for loss in (ours, theirs))
    return float((a - b).norm() / b.norm())


# --------------------------------------------------------------------------------------------------- Eulerian methods


@SOURCES
def test_improved_meanflow_as_printed(velocity: Callable[..., Tensor]) -> None:
    """``||u + (t - r) sg(du/dt) - v||^2`` has MeanFlow's value and gradient where tangents are equal. Measured: 1e-16.
    With tangents of its own it has others."""
    net, batch = random_network(), random_batch()
    meanflow = matching(net, Eulerian(), velocity)
    rows, _ = meanflow.rows(batch, KEY)
    v = velocity(net, rows)
    du_dt = forward_derivative(net, rows.x, v, rows.t, rows.r, None)
    printed = (net(rows.x, rows.t, rows.r) + expand(rows.t - rows.r, v) * du_dt - v).square().mean(dim=1)
    ours = meanflow(batch, KEY).per_sample_B
    torch.testing.assert_close(ours, printed, rtol=1e-12, atol=1e-14)
    same_gradients(ours.mean(), printed.mean(), net)
    again = matching(net, Eulerian(tangent=velocity), velocity)(batch, KEY).per_sample_B
    assert torch.equal(again, ours)

    own = matching(net, Eulerian(tangent=diagonal), velocity)(batch, KEY).per_sample_B
    du_dt = forward_derivative(net, rows.x, net(rows.x, rows.t, rows.t).detach(), rows.t, rows.r, None)
    printed = (net(rows.x, rows.t, rows.r) + expand(rows.t - rows.r, v) * du_dt - v).square().mean(dim=1)
    torch.testing.assert_close(own, printed, rtol=1e-12, atol=1e-14)
    same_gradients(own.mean(), printed.mean(), net)
    assert float((own - ours).detach().abs().max()) > 0.1


@pytest.mark.parametrize("k", [0.5, 0.99, 1.0])
@pytest.mark.parametrize("c", [None, 0.1])
def test_align_your_flow_as_printed(k: float, c: float | None) -> None:
    """``||u - sg(u- - g)||^2`` with ``g = u- - v + k (t - r) du/dt``, which at k = 1 is MeanFlow's gradient; and with
    ``g / (||g|| + c)``, norms per coordinate, under the normalised weight. Its loss is not the printed one, which is
    ``g^2`` whatever the student."""
    net, batch = random_network(), random_batch()
    weight = {} if c is None else {"weight": NormalisedTangent(c)}
    objective = matching(net, Eulerian(factor=Constant(k)), TeacherVelocity(TEACHER), **weight)
    rows, _ = objective.rows(batch, KEY)
    u, v = net(rows.x, rows.t, rows.r), TEACHER(rows.x, rows.t)
    du_dt = forward_derivative(net, rows.x, v, rows.t, rows.r, None)
    g = u.detach() - v + k * expand(rows.t - rows.r, v) * du_dt
    if c is not None:
        g = g / (g.square().mean(dim=1, keepdim=True).sqrt() + c)
    printed = (u - (u.detach() - g)).square().mean()
    same_gradients(objective(batch, KEY).per_sample_B.mean(), printed, net, tolerance=1e-7)
    if k == 1 and c is None:
        meanflow = matching(net, Eulerian(), TeacherVelocity(TEACHER))(batch, KEY).per_sample_B.mean()
        same_gradients(printed, meanflow, net)


@SOURCES
def test_modular_meanflow(velocity: Callable[..., Tensor]) -> None:
    """At k = 0 MeanFlow's gradient; at k = 1 that of the identity with nothing stopped, by differentiating twice; in
    between it is linear in k. The value is MeanFlow's throughout."""
    net, batch = random_network(), random_batch()

    def loss(k: float) -> Tensor:
        return matching(net, Modulated(path_derivative, Constant(k)), velocity, pairs=double_pairs)(
            batch, KEY
        ).per_sample_B

    meanflow = matching(net, Eulerian(), velocity, pairs=double_pairs)
    wanted = meanflow(batch, KEY).per_sample_B
    for k in (0.0, 0.3, 1.0):
        torch.testing.assert_close(loss(k), wanted, rtol=1e-12, atol=1e-13)
    same_gradients(loss(0.0).mean(), wanted.mean(), net)
    same_gradients(loss(1e-9).mean(), wanted.mean(), net, tolerance=1e-7)

    rows, _ = meanflow.rows(batch, KEY)
    v, gap = velocity(net, rows), expand(rows.t - rows.r, rows.x)
    x, t = rows.x.clone().requires_grad_(), rows.t.clone().requires_grad_()
    u = net(x, t, rows.r)
    by = [torch.autograd.grad(u[:, j].sum(), (x, t), create_graph=True) for j in range(D)]
    du_dt = torch.stack([(by_x * v).sum(dim=1) + by_t for by_x, by_t in by], dim=1)
    whole = (u + gap * du_dt - v).square().mean()
    same_gradients(loss(1.0).mean(), whole, net, tolerance=1e-9)
    assert distance(wanted.mean(), whole, net) > 0.1
    mixed = 0.3 * loss(1.0) + 0.7 * loss(0.0)
    same_gradients(loss(0.3).mean(), mixed.mean(), net)


# --------------------------------------------------------------------------------------------------- discrete methods

ALPHAS = (1e-1, 3e-2, 1e-2, 3e-3)


def test_a_discrete_step_goes_over_into_the_derivative() -> None:
    """``(u - target) / alpha`` into MeanFlow's residual, linearly. Measured: orders 0.99 to 1.01."""
    net, rows = random_network(), some_rows()
    wanted = meanflow_residual(net, rows, rows.v_c, rows.v_c)
    errors = [(outcome(Discrete(Constant(a)), net, rows, rows.v_c) - wanted).norm() for a in ALPHAS]
    assert order(ALPHAS, errors) == pytest.approx(1, abs=0.1)
    assert float(errors[-1].detach()) < 0.05 * float(wanted.norm())


@SOURCES
@pytest.mark.parametrize("weight", [{}, {"weight": AdaptivePower(1.0, 0.01)}], ids=["plain", "adaptive"])
def test_alpha_flow_goes_over_into_meanflow(velocity: Callable[..., Tensor], weight: dict[str, AdaptivePower]) -> None:
    """With diagonal rows: the residual of every sample and the gradient of the whole loss, linearly;
    the loss of the rows that jump is alpha times MeanFlow's. At alpha = 0 it is MeanFlow's to the bit."""
    net, batch = random_network(), random_batch(64)

    def output(rule: Rule) -> tuple[Tensor, Tensor]:
        result = matching(net, rule, velocity, pairs=double_pairs, **weight)(batch, KEY)
        return result.per_sample_B, result.residual_B

    loss, residual = output(Eulerian())
    by_value, by_gradient, by_loss = [], [], []
    for alpha in ALPHAS:
        found, found_residual = output(Discrete(Constant(alpha)))
        by_value.append((found_residual - residual).norm())
        by_gradient.append(distance(found.mean(), loss.mean(), net))
        by_loss.append((found[16:] / alpha - loss[16:]).detach().norm())
        torch.testing.assert_close(found[:16], loss[:16], rtol=1e-12, atol=0)
    for errors in (by_value, by_gradient, by_loss):
        assert order(ALPHAS, errors) == pytest.approx(1, abs=0.1)
    limit, _ = output(Discrete(Constant(0.0)))
    assert torch.equal(limit, loss)
    same_gradients(limit.mean(), loss.mean(), net)
    own = output(Discrete(Constant(0.0), limit=Eulerian(tangent=diagonal)))
    assert torch.equal(own[0], output(Eulerian(tangent=diagonal))[0])


@SOURCES
def test_alpha_one_is_flow_matching_on_jumps(velocity: Callable[..., Tensor]) -> None:
    net, batch = random_network(), random_batch()
    objective = matching(net, Discrete(Constant(1.0)), velocity)
    rows, _ = objective.rows(batch, KEY)
    wanted = (net(rows.x, rows.t, rows.r) - velocity(net, rows)).square().mean(dim=1)
    loss = objective(batch, KEY).per_sample_B
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    same_gradients(loss.mean(), wanted.mean(), net)


@pytest.mark.parametrize("rho", [0.5, 0.1, 0.002])
def test_soflow_as_printed(rho: float) -> None:
    """``-u . sg(w dq)`` with ``dq = (f(x_t, t, r) - f(x_l, l, r)) / (t - l)``, ``l = t - rho (t - r)``, and ``w = 1 /
    (mean dq^2 + 0.01)`` has the gradient of alpha-Flow at alpha = rho under the adaptive weight with p = 1 and c = 0.01
    D, times D / 2 for every row."""
    net, rows = random_network(), some_rows()
    gap, later = rows.t - rows.r, rows.t - rho * (rows.t - rows.r)
    x_l = rows.x - expand(rows.t - later, rows.x) * rows.v_c
    u = net(rows.x, rows.t, rows.r)
    f_t, f_l = rows.x - expand(gap, u) * u, x_l - expand(later - rows.r, u) * net(x_l, later, rows.r)
    dq = ((f_t - f_l) / expand(rows.t - later, u)).detach()
    w = 1 / (dq.square().mean(dim=1) + 0.01)
    printed = -(u * dq).sum(dim=1) * w

    delta = outcome(Discrete(Constant(rho)), net, rows, rows.v_c)
    torch.testing.assert_close(-dq, delta.detach(), rtol=0, atol=1e-10)
    ours = rho * AdaptivePower(1.0, 0.01 * D)(delta, rows.t, rows.r)
    for row in (0, 7, B - 1):
        same_gradients(ours[row] * D / 2, printed[row], net, tolerance=1e-9)


# ------------------------------------------------------------------------------------------------------ split methods


def test_a_split_near_the_start_is_meanflow_with_a_tangent_of_its_own() -> None:
    """``(u - target) / lambda`` as lambda goes to zero: the residual with ``v = w = u(x, t, t)``, linearly."""
    net, rows = random_network(), some_rows()
    v = net(rows.x, rows.t, rows.t).detach()
    wanted = meanflow_residual(net, rows, v, v)
    errors = [(outcome(Split("random"), net, rows, key=Fixed(a)).detach() / a - wanted).norm() for a in ALPHAS]
    assert order(ALPHAS, errors) == pytest.approx(1, abs=0.1)


def test_a_split_near_the_end() -> None:
    """At lambda = 1 the first jump is the whole one."""
    net, rows = random_network(), some_rows()
    assert float(outcome(Split("random"), net, rows, key=Fixed(1.0)).detach().abs().max()) < 1e-14


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_split_whose_first_jump_is_the_velocity_is_a_discrete_step(share: float) -> None:
    net, rows = random_network(), some_rows()

    def with_velocity(x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        return rows.v_c if torch.equal(t, rows.t) else net(x, t, r, label)

    ours = Split("random")(net, rows, setting(with_velocity, key=Fixed(share))).target
    theirs = Discrete(Constant(share))(net, rows, setting(net, rows.v_c)).target
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_a_random_split_draws_evenly() -> None:
    """Keyed by sample: a first jump of share lambda, uniform on (0, 1)."""
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
            seen.append(r)
            return x

    n = 4000
    one = torch.ones(n, dtype=torch.float64)
    rows = Rows(torch.zeros(n, 1), one, 0 * one, None, torch.zeros(n, 1), torch.arange(n))
    Split("random")(Recorder(), rows, setting(Recorder()))
    share = 1 - seen[0]
    assert torch.equal(share, 1 - (1 - KEY.uniform("split", rows.index)))
    for bound in (0.1, 0.5, 0.9):
        assert float((share < bound).double().mean()) == pytest.approx(bound, abs=4 * (0.25 / n) ** 0.5)


def test_a_split_in_half_of_a_frozen_network_is_progressive_distillation() -> None:
    """And so is shortcut's target, above its finest level; at that one it is two Euler steps of the diagonal."""
    net, frozen, rows = random_network(), random_network(), some_rows()
    for parameter in frozen.parameters():
        parameter.data *= 0.7
    middle = (rows.t + rows.r) / 2
    wanted = two_steps(AverageVelocityMap(frozen), rows.x, rows.t, middle, rows.r)
    for finest in (0.0, 0.1):
        found = Split("half", finest=finest)(net, rows, setting(frozen)).target
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)

    def euler(x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        return x - expand(t - r, x) * frozen(x, t, t, label)

    x_r = euler(euler(rows.x, rows.t, middle), middle, rows.r)
    wanted = ((rows.x - x_r) / expand(rows.t - rows.r, x_r)).detach()
    found = Split("half", finest=1.0)(net, rows, setting(frozen)).target
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    length = float((rows.t - rows.r)[5])
    mixed = Split("half", finest=length)(net, rows, setting(frozen)).target
    fine = rows.t - rows.r <= length
    assert 0 < int(fine.sum()) < B
    torch.testing.assert_close(mixed[fine], found[fine], rtol=0, atol=1e-13)
    assert (mixed[~fine] - found[~fine]).abs().min(dim=0).values.max() > 1e-6


def test_where_a_split_meets_its_bound() -> None:
    """States between the jumps are clipped too, not only targets."""
    rows = some_rows()

    def steep(x: Tensor, t: Tensor, r: Tensor, label: Tensor | None = None) -> Tensor:
        return 0.9 * x if torch.equal(t, rows.t) else 0.1 * x

    wide = replace(rows, x=10 * rows.x)
    found = Split("half", clip=4.0)(steep, wide, setting(steep)).target
    first = 9 * rows.x
    x_q = (wide.x - expand((rows.t - rows.r) / 2, first) * first).clamp(-4, 4)
    torch.testing.assert_close(found, (first / 2 + 0.05 * x_q).clamp(-4, 4), rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------- Lagrangian methods


def by_two_backward_passes(net: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` and ``d_r u``, differentiable, without forward mode."""
    r = r.clone().requires_grad_()
    u = net(x, t, r)
    return u, torch.stack([torch.autograd.grad(u[:, j].sum(), r, create_graph=True)[0] for j in range(D)], dim=1)


@pytest.mark.parametrize("target", ["teacher", "own", "averaged"])
def test_lagrangian_methods_as_printed(target: str) -> None:
    """``||u - (t - r) d_r u - sg v(sg f, r)||^2`` and flow matching on the diagonal, value and gradient. Measured:
    1e-14. The gradient does pass the derivative: without it, it differs by more than a tenth. An averaged network is
    another one after a step."""
    net, batch = random_network(), random_batch()
    decay = 0.5 if target == "averaged" else 0.0
    rule = Lagrangian(end_derivative, TeacherVelocity(TEACHER)) if target == "teacher" else Lagrangian(end_derivative)
    objective: FlowMapMatching = matching(net, rule, pairs=double_pairs, target_decay=decay)
    end = net
    if target == "averaged":
        (end,) = objective.targets()
        for parameter in net.parameters():
            parameter.data *= 0.8
        objective.after_step()
        before = next(end.parameters()).clone()
        torch.testing.assert_close(before, 1.125 * next(net.parameters()), rtol=1e-12, atol=0)
    rows, diagonal_rows = objective.rows(batch, KEY)

    def printed(through: bool) -> Tensor:
        u, du_dr = by_two_backward_passes(net, rows.x, rows.t, rows.r)
        du_dr = du_dr if through else du_dr.detach()
        gap = expand(rows.t - rows.r, u)
        f = (rows.x - gap * u).detach()
        v = TEACHER(f, rows.r) if target == "teacher" else end(f, rows.r, rows.r).detach()
        jumps = (u - gap * du_dr - v).square().mean(dim=1)
        straight = (u - rows.v_c).square().mean(dim=1)
        return torch.cat((straight[:diagonal_rows], jumps[diagonal_rows:]))

    loss = objective(batch, KEY).per_sample_B
    torch.testing.assert_close(loss, printed(True), rtol=1e-11, atol=1e-13)
    same_gradients(loss.mean(), printed(True).mean(), net, tolerance=1e-10)
    assert distance(printed(False).mean(), printed(True).mean(), net) > 0.1


def test_free_flow_as_printed() -> None:
    """``||u - sg(v_T(X, r) + (1 - r) d_r u)||^2`` at ``t = 1``, in float32 times: the gradient does not pass the
    derivative."""
    net, batch = random_network(), random_batch()
    objective = FreeFlow(
        net,
        teacher=TEACHER,
        ends=dyadic,
        derivative=end_derivative,
        correction=0.0,
        renoise=dyadic,
        noise=double_noise,
    )
    z = double_noise(batch, KEY)
    r = dyadic(KEY.uniform("time", batch.index))
    u, du_dr = by_two_backward_passes(net, z, torch.ones_like(r), r)
    gap = expand(1 - r, z)
    printed = (u - (TEACHER(z - gap * u, r) + gap * du_dr).detach()).square().mean(dim=1)
    output = objective(batch, KEY)
    torch.testing.assert_close(output.per_sample_B, printed, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        output.diagnostics["jvp_norm"], du_dr.detach().square().mean(dim=1).sqrt(), rtol=1e-5, atol=0
    )
    assert torch.equal(output.t_B.double(), 1 - r)
    same_gradients(output.per_sample_B.mean(), printed.mean(), net, tolerance=1e-5)


# ----------------------------------------------------------------------------------------------------------- guidance

CLASSES = 4


@pytest.mark.parametrize("mix", [None, 0.0, 0.92])
@pytest.mark.parametrize("w", [1.0, 2.5])
def test_a_student_that_guides_itself(w: float, mix: float | None) -> None:
    """``a v_c + b u(c) + (1 - a - b) u(null)`` with ``a = w (1 - b)``: of a student that is at rest, whose diagonal is
    ``v(null) + w (v(c) - v(null))``, the target is that again when ``v_c`` is ``v(c)``. Improved MeanFlow's form is ``b
    = 1 - 1/w``, MeanFlow's b is its kappa, Terminal Velocity Matching's is zero."""
    net, rows = random_network(classes=CLASSES), replace(some_rows(), label=torch.arange(B) % CLASSES)
    null = torch.full_like(rows.label, CLASSES)
    on_class, on_null = (net(rows.x, rows.t, rows.t, label).detach() for label in (rows.label, null))
    v_class = on_null + (on_class - on_null) / w  # so that u(c) is at rest
    velocity = SelfGuided(CLASSES, (w, 0.0, 1.0), mix)
    found = velocity(net, replace(rows, v_c=v_class))
    assert not found.requires_grad
    torch.testing.assert_close(found, on_class, rtol=0, atol=1e-6)
    b = 0.0 if w == 1 else 1 - 1 / w if mix is None else mix
    a = w * (1 - b)
    wanted = a * rows.v_c + b * on_class + (1 - a - b) * on_null
    torch.testing.assert_close(velocity(net, rows), wanted, rtol=0, atol=1e-6)


def test_guidance_ends_with_its_window_and_with_the_class() -> None:
    net, rows = random_network(classes=CLASSES), replace(some_rows(), label=torch.arange(B) % CLASSES)
    low, high = (float(rows.t.sort().values[k]) for k in (6, 17))
    outside = (rows.t < low) | (rows.t > high)
    assert 5 < int(outside.sum()) < 13
    whole, part = (SelfGuided(CLASSES, (3.0, *window), 0.4)(net, rows) for window in ((0.0, 1.0), (low, high)))
    torch.testing.assert_close(part[outside], rows.v_c[outside], rtol=0, atol=1e-12)
    assert torch.equal(part[~outside], whole[~outside])
    lost = replace(rows, label=rows.label.masked_fill(rows.index < 5, CLASSES))
    found = SelfGuided(CLASSES, (3.0, 0.0, 1.0), 0.4)(net, lost)
    torch.testing.assert_close(found[:5], rows.v_c[:5], rtol=0, atol=1e-12)
    assert torch.equal(found[5:], whole[5:])
    with pytest.raises(ValueError, match="guidance needs labels"):
        SelfGuided(CLASSES, (3.0, 0.0, 1.0))(net, some_rows())

    def field(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return net(x, t, t, label).detach()

    contrast = ClassContrast(field, CLASSES)
    found = ContrastedVelocity(contrast, (3.0, low, high))(net, rows)
    teacher = guided(field, 3.0, CLASSES)(rows.x, rows.t, rows.label)
    torch.testing.assert_close(found[~outside], teacher[~outside], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[outside], field(rows.x, rows.t, rows.label)[outside], rtol=0, atol=1e-6)
    told = replace(rows, guidance_B3=torch.tensor([3.0, 0.0, 1.0]).expand(B, 3))
    found = ContrastedVelocity(contrast, (1.0, 0.0, 1.0))(net, told)
    torch.testing.assert_close(found, teacher, rtol=0, atol=1e-6)


def test_what_a_student_is_told_when_it_guides_itself() -> None:
    """With guidance as an input: that of the rows, under the class; none, without."""
    asked: dict[int, Tensor] = {}

    class Told(nn.Module):
        def forward(self, x: Tensor, t: Tensor, r: Tensor, label: Tensor, guidance_B3: Tensor) -> Tensor:
            assert torch.equal(t, r)
            asked[int(label[0])] = guidance_B3
            return 0 * x + guidance_B3[:, :1].to(x)

    told = torch.tensor([3.0, 0.0, 1.0]).expand(B, 3)
    rows = replace(some_rows(), label=torch.zeros(B, dtype=torch.int64), guidance_B3=told)
    found = SelfGuided(CLASSES, (9.0, 0.5, 0.5))(Told(), rows)
    assert torch.equal(asked[0], told)
    assert torch.equal(asked[CLASSES], torch.tensor([1.0, 0.0, 1.0]).expand(B, 3))
    torch.testing.assert_close(found, rows.v_c + 2 / 3 * (3.0 - 1.0), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- schedules


def test_rules_follow_the_training() -> None:
    """A factor, a step or a modulation is that of the share of the training that is done at the key's step."""
    net, rows = random_network(), some_rows()
    ramp = Ramp(0.0, 1.0)
    for rule in (lambda s: Eulerian(factor=s), lambda s: Discrete(s), lambda s: Modulated(path_derivative, s)):
        at_start, at_half = (outcome(rule(ramp), net, rows, rows.v_c, done=done) for done in (0.25, 0.5))
        same_gradients(at_half.square().sum(), outcome(rule(Constant(0.5)), net, rows, rows.v_c).square().sum(), net)
        assert distance(at_start.square().sum(), at_half.square().sum(), net) > 0.01
    asked: list[int] = []

    def done(step: int) -> float:
        asked.append(step)
        return 0.5

    objective = matching(net, Eulerian(factor=ramp), done=done)
    half = matching(net, Eulerian(factor=Constant(0.5)))
    batch = random_batch()
    assert torch.equal(objective(batch, KEY).per_sample_B, half(batch, KEY).per_sample_B)
    assert asked == [KEY.step]
