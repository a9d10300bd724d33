"""FreeFlow: a student from noise alone. What it predicts, how it is corrected, and who learns from what."""

import math

import pytest
import scores
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MixtureSpec
from fewstep.distill.flow_maps.free_flow import FreeFlow
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.tangent import EndDerivative, end_derivative, end_difference
from fewstep.flow import LINEAR, VelocityField
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.times import Times, jump_rows, logit_normal, sample_times, uniform

KEY = Key(3, step=5)
GAUSSIAN = GaussianTeacher(0.4, 0.6)
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.4, 0.6), means=((-0.7,), (0.6,)), stds=(0.5, 0.4)))


def double_noise(batch: Batch, key: Key) -> Tensor:
    return key.normal("noise", batch.index, tuple(batch.x.shape[1:])).double()


def free_flow(
    student: nn.Module,
    teacher: VelocityField,
    *,
    correction: float = 0.5,
    renoise: Times = uniform,
    derivative: EndDerivative = end_derivative,
    correction_weight: float = 1.0,
    weight: Weight = plain,
) -> FreeFlow:
    return FreeFlow(
        student,
        teacher=teacher,
        ends=logit_normal(0.2, 1.0),
        derivative=derivative,
        correction=correction,
        correction_weight=correction_weight,
        renoise=renoise,
        weight=weight,
        noise=double_noise,
    )


def half(u: Tensor) -> Tensor:
    return torch.full_like(u, 0.5)


def nothing(count: int = 32, dimensions: int = 1, classes: int = 0) -> Batch:
    index = torch.arange(count)
    label = index % classes if classes else None
    return Batch(torch.full((count, dimensions), torch.nan, dtype=torch.float64), label, index)


def random_network(dimensions: int = 2, classes: int = 0, seed: int = 0) -> nn.Module:
    net = build_network(MLPConfig(width=16, depth=1), (dimensions,), classes, two_times=True).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


class Exact(nn.Module):
    def __init__(self, teacher: GaussianTeacher | MixtureTeacher, scale: float = 1.0) -> None:
        super().__init__()
        self.teacher = teacher
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        assert (t_B == 1).all()
        return self.scale * self.teacher.average_velocity(x, t_B, r_B, label_B)


# ---------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("teacher", [GAUSSIAN, LINE], ids=["gaussian", "mixture"])
def test_the_exact_map_predicts_itself(teacher: GaussianTeacher | MixtureTeacher) -> None:
    """Identity at ``t = 1``, pointwise, without any data: they are NaN. One 10 % off is pulled back."""
    output = free_flow(Exact(teacher), teacher, correction=0.0)(nothing(256), KEY)
    # Times of float32: of the mixture, whose map is a quotient by 1 - r, the rounding of r near 1 remains.
    assert float(output.per_sample_B.detach().max().sqrt()) < 1e-6
    for scale in (0.9, 1.1):
        net = Exact(teacher, scale)
        loss = free_flow(net, teacher, correction=0.0)(nothing(256), KEY).per_sample_B.mean()
        (slope,) = torch.autograd.grad(loss, net.scale)
        assert float(slope) * (scale - 1) > 0
        assert float(loss) > 1e-3


@pytest.mark.parametrize("derivative", [end_derivative, end_difference(1e-3)], ids=["forward", "difference"])
def test_prediction_by_hand(derivative: EndDerivative) -> None:
    """``v_T(z - (1 - r) u, r) + (1 - r) d_r u`` with a difference by hand; the gradient is that of this constant."""
    net, teacher = (
        random_network(classes=3),
        MixtureTeacher(
            torch.ones(3), torch.tensor([[-1.0, 0.2], [0.5, 1.0], [0.7, -0.6]]), torch.full((3,), 0.3), torch.arange(3)
        ),
    )
    batch = nothing(24, 2, classes=3)
    z, ones, h = double_noise(batch, KEY), torch.ones(24, dtype=torch.float64), 1e-6
    r = sample_times(logit_normal(0.2, 1.0), KEY, "time", batch.index)
    gap = (1 - r)[:, None]
    with torch.no_grad():
        u = net(z, ones, r, batch.label)
        du_dr = (net(z, ones, r.double() + h, batch.label) - net(z, ones, r.double() - h, batch.label)) / (2 * h)
        target = teacher(z - gap * u, r, batch.label) + gap * du_dr
    wanted = (net(z, ones, r, batch.label) - target).square().mean(dim=1)
    output = free_flow(net, teacher, correction=0.0, derivative=derivative)(batch, KEY)
    # Ends of jumps are float32: so are differences of them, to 6e-8 / 2e-3.
    close = {"rtol": 1e-4, "atol": 1e-5 if derivative is end_derivative else 1e-3}
    torch.testing.assert_close(output.per_sample_B, wanted, **close)
    torch.testing.assert_close(output.diagnostics["jvp_norm"], du_dr.square().mean(dim=1).sqrt(), **close)
    torch.testing.assert_close(output.t_B, 1 - r)
    assert du_dr.abs().mean() > 0.02
    parameters = list(net.parameters())
    grads = (torch.autograd.grad(loss.mean(), parameters) for loss in (output.per_sample_B, wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_data_do_not_matter() -> None:
    """Only labels and places in the batch: with images instead of NaN the losses have the same bits."""
    objective = free_flow(random_network(classes=3), GaussianTeacher(0.4, 0.6))
    empty = nothing(32, 2, classes=3)
    full = Batch(torch.rand(32, 2, dtype=torch.float64), empty.label, empty.index)
    one, other = objective(empty, KEY), objective(full, KEY)
    assert torch.equal(one.per_sample_B, other.per_sample_B)
    assert one.per_sample_B.isfinite().all()
    assert not torch.equal(objective(full, Key(3, 6)).per_sample_B, other.per_sample_B)


@pytest.mark.parametrize("count", [2, 32])
def test_rows_do_not_depend_on_their_neighbours(count: int) -> None:
    """Two halves of a batch have its losses, predictions first in each; and so have single rows, of which none
    predicts or none is corrected."""
    objective, batch = free_flow(random_network(classes=3), GaussianTeacher(0.4, 0.6)), nothing(32, 2, classes=3)
    whole = objective(batch, KEY).per_sample_B
    parts = []
    for rows in torch.arange(32).chunk(count):
        assert batch.label is not None
        parts.append(objective(Batch(batch.x[rows], batch.label[rows], batch.index[rows]), KEY).per_sample_B)
    torch.testing.assert_close(torch.cat(parts).sort().values, whole.sort().values, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- correction


class Scaled(nn.Module):
    """``G(z) = a z``: the jump to data has ``u = (1 - a) z``; jumps elsewhere follow the flow of N(0, a^2)."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return (1 - self.a) * x


class Fake(nn.Module):
    """The exact velocity of N(0, a^2), times ``off``, where the student's copy was."""

    def __init__(self, a: float, off: float = 1.0) -> None:
        super().__init__()
        self.std = a
        self.off = nn.Parameter(torch.tensor(off, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        assert torch.equal(t_B, r_B)
        self.x, self.v = x.detach(), self.off * GaussianTeacher(0.0, self.std)(x, t_B)
        if self.v.requires_grad:
            self.v.retain_grad()
        return self.v


DATA = GaussianTeacher(0.0, 0.5)


def corrected(a: float, *, off: float = 1.0, renoise: Times = half, correction_weight: float = 1.0) -> FreeFlow:
    """Every row corrects: ``G(z) = a z`` with the exact fake velocity, data N(0, .25)."""
    objective = free_flow(Scaled(a), DATA, correction=1.0, renoise=renoise, correction_weight=correction_weight)
    objective.fake = Fake(a, off)
    return objective


@pytest.mark.parametrize(("a", "wanted"), [(0.3, -0.064), (0.5, 0.0), (0.7, 0.096)])
def test_the_sign_of_the_correction(a: float, wanted: float) -> None:
    """``E[(xhat_fake - xhat_real) x_t]`` at ``t = 1/2`` is -.064, 0 and .096; data predictions differ by ``-q`` times
    the velocities, so the move is minus that over its scale: samples that spread too little are moved outwards."""
    n = 100_000
    objective, batch = corrected(a), nothing(n)
    xhat = a * double_noise(batch, KEY)
    move, _ = objective.corrected(xhat, KEY, batch.index, None)
    fresh = KEY.normal("renoise", batch.index, (1,)).double()
    x_t = 0.5 * xhat + 0.5 * fresh
    q = torch.full((n,), 0.5, dtype=torch.float64)
    real = x_t - 0.5 * DATA(x_t, q)
    fake = x_t - 0.5 * GaussianTeacher(0.0, a)(x_t, q)
    torch.testing.assert_close(move, -(fake - real) / (xhat - real).abs().clamp_min(1e-6), rtol=1e-9, atol=1e-12)
    product = ((fake - real) * x_t)[:, 0]
    assert float(product.mean()) == pytest.approx(wanted, abs=5e-4 + 4 * float(product.std()) / math.sqrt(n))
    if a == 0.5:
        assert not move.any()
    else:
        assert float((move * xhat).mean()) * (0.5 - a) > 0
    # And the sample's coordinates share a scale: their mean distance.
    wide = xhat.reshape(-1, 2)
    index = batch.index[: len(wide)]
    moved, _ = objective.corrected(wide, KEY, index, None)
    x_q = 0.5 * wide + 0.5 * KEY.normal("renoise", index, (2,)).double()
    q2 = q[: len(wide)]
    real, fake = x_q - 0.5 * DATA(x_q, q2), x_q - 0.5 * GaussianTeacher(0.0, a)(x_q, q2)
    scale = (wide - real).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(moved, -(fake - real) / scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("correction_weight", [1.0, 0.3])
def test_a_corrected_row_regresses_on_its_moved_sample(correction_weight: float) -> None:
    """``|| u - sg(u - weight move) ||^2``: its value is the size of the move, its gradient moves ``z - u``."""
    objective, batch = corrected(0.3, renoise=uniform, correction_weight=correction_weight), nothing(64)
    z = double_noise(batch, KEY)
    move, fake_loss = objective.corrected(0.3 * z, KEY, batch.index, None)
    output = objective(batch, KEY)
    wanted = (correction_weight * move).square().mean(dim=1) + fake_loss
    torch.testing.assert_close(output.per_sample_B, wanted, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(output.per_sample_B.mean(), objective.student.a)
    # dL/du = 2 weight move / D, and du/da = -z.
    torch.testing.assert_close(slope, (-2 * correction_weight * move * z).mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.residual_B, (correction_weight * move).square().mean(dim=1))
    assert torch.equal(output.t_B, torch.ones(64))  # whole jumps


def test_samples_come_to_rest_at_the_data() -> None:
    """Descent with an exact fake velocity brings ``a`` from both sides to .5, where nothing moves."""
    for start in (0.3, 0.7):
        a = start
        for step in range(80):
            objective = corrected(a, renoise=uniform)
            loss = objective(nothing(200), Key(0, step)).per_sample_B.mean()
            (slope,) = torch.autograd.grad(loss, objective.student.a)
            assert float(slope) * (a - 0.5) >= 0
            a -= 0.03 * float(slope)
        assert a == pytest.approx(0.5, abs=5e-3)
    at_rest = corrected(0.5, renoise=uniform)
    (slope,) = torch.autograd.grad(at_rest(nothing(200), KEY).per_sample_B.mean(), at_rest.student.a)
    assert abs(float(slope)) < 1e-12


def test_the_fake_velocity_learns_the_flow_of_the_samples() -> None:
    """Its loss is ``|| g(x_q, q) - (e' - xhat) ||^2 / D`` on re-noised samples, whose minimiser is their marginal
    velocity: scores of the exact one within bounds, of one 5 % off not."""
    n = 40_000

    def score(off: float) -> float:
        objective, batch = corrected(0.3, off=off, renoise=uniform), nothing(n)
        _, loss = objective.corrected(0.3 * double_noise(batch, KEY), KEY, batch.index, None)
        loss.sum().backward()
        fake = objective.fake
        assert isinstance(fake, Fake)
        assert fake.v.grad is not None
        parts = (value[:, 0].numpy() for value in (fake.x, fake.v.detach(), fake.v.grad))
        return scores.mean_of(scores.products(*parts)).score

    assert score(1.0) < scores.bound(10)
    assert score(1.05) > 1.3 * scores.bound(10)
    objective, batch = corrected(0.3, renoise=uniform), nothing(100)
    xhat = 0.3 * double_noise(batch, KEY)
    q = sample_times(uniform, KEY, "renoise_time", batch.index)
    fresh = KEY.normal("renoise", batch.index, (1,)).double()
    point = LINEAR.sample(xhat, fresh, q)
    _, loss = objective.corrected(xhat, KEY, batch.index, None)
    wanted = (GaussianTeacher(0.0, 0.3)(point.x_t, q) - (fresh - xhat)).square().mean(dim=1)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-12)


def test_noise_that_is_added_is_not_the_noise_of_the_sample() -> None:
    """The two draws are independent: correlation within four standard errors."""
    index = torch.arange(20_000)
    z, fresh = KEY.normal("noise", index), KEY.normal("renoise", index)
    assert abs(float(torch.corrcoef(torch.stack((z, fresh)))[0, 1])) < 4 / math.sqrt(20_000)


# ------------------------------------------------------------------------------------------------ who learns from what


def test_losses_of_student_and_fake_keep_apart() -> None:
    """The fake's gradient is that of its own loss, the student's is that of the loss without the fake's; neither is
    zero. Labels reach all three networks in their rows' order."""
    net, batch = random_network(classes=3), nothing(32, 2, classes=3)
    objective = free_flow(net, GaussianTeacher(0.4, 0.6), renoise=half)
    assert objective.fake is not None
    assert objective.fake is not net
    for parameter, copy in zip(net.parameters(), objective.fake.parameters(), strict=True):
        assert torch.equal(parameter, copy)
        assert parameter is not copy
    for parameter in objective.fake.parameters():
        parameter.data *= 1.3
    corrects = jump_rows(batch.index, 0.5)
    index, label = batch.index[corrects], batch.label[corrects]  # type: ignore[index]
    z, ones, zero = double_noise(batch, KEY)[corrects], torch.ones(16), torch.zeros(16)
    u = net(z, ones, zero, label)
    move, fake_loss = objective.corrected(z - u.detach(), KEY, index, label)
    assert not move.requires_grad
    output = objective(batch, KEY)
    torch.testing.assert_close(output.per_sample_B[16:], move.square().mean(dim=1) + fake_loss, rtol=1e-6, atol=1e-6)
    fakes, students = list(objective.fake.parameters()), list(net.parameters())
    total = output.per_sample_B.mean()
    ours = torch.autograd.grad(total, fakes, retain_graph=True)
    theirs = torch.autograd.grad(fake_loss.sum() / 32, fakes)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-3

    own = torch.autograd.grad(total, students, retain_graph=True)
    predicted = torch.autograd.grad(output.per_sample_B[:16].sum() / 32, students)
    constant = (u - (u - move).detach()).square().mean(dim=1).sum() / 32
    moved = torch.autograd.grad(constant, students)
    for one, p, c in zip(own, predicted, moved, strict=True):
        torch.testing.assert_close(one, p + c, rtol=1e-6, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in moved) > 1e-3


def test_without_correction_there_is_no_fake_network() -> None:
    objective = free_flow(random_network(), GaussianTeacher(0.4, 0.6), correction=0.0)
    assert objective.fake is None
    assert objective.own_parameters() == {}
    assert objective.extra_state() == {}
    output = objective(nothing(8, 2), KEY)
    assert set(output.diagnostics) == {"jvp_norm"}
    assert output.diagnostics["jvp_norm"].isfinite().all()


def test_the_fake_network_is_trained_and_kept() -> None:
    objective = free_flow(random_network(), GaussianTeacher(0.4, 0.6), correction=0.25)
    names = {f"fake.{name}" for name in objective.student.state_dict()}
    assert set(objective.own_parameters()) == set(objective.extra_state()) == names
    assert objective.targets() == ()
    other = free_flow(random_network(seed=1), GaussianTeacher(0.4, 0.6), correction=0.25)
    other.load_extra_state({name: value.clone() for name, value in objective.extra_state().items()})
    for name, value in objective.extra_state().items():
        assert torch.equal(other.extra_state()[name], value)


def test_rows_that_predict_come_first() -> None:
    """A quarter corrects; diagnostics are NaN where they do not apply; any weight counts for both."""
    objective = free_flow(random_network(), GaussianTeacher(0.4, 0.6), correction=0.25)
    output = objective(nothing(32, 2), KEY)
    assert output.diagnostics["jvp_norm"][:24].isfinite().all()
    assert output.diagnostics["jvp_norm"][24:].isnan().all()
    assert output.diagnostics["fake_residual"][:24].isnan().all()
    fake_loss = output.diagnostics["fake_residual"][24:]
    assert (fake_loss > 0).all()
    torch.testing.assert_close(output.per_sample_B[:24].detach(), output.residual_B[:24])
    torch.testing.assert_close(output.per_sample_B[24:].detach(), output.residual_B[24:] + fake_loss)
    seen: list[tuple[Tensor, Tensor]] = []

    def weighed(delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        seen.append((t_B, r_B))
        return 3 * plain(delta, t_B, r_B)

    objective.weight = weighed
    tripled = objective(nothing(32, 2), KEY)
    torch.testing.assert_close(tripled.per_sample_B[:24], 3 * output.per_sample_B[:24])
    torch.testing.assert_close(tripled.residual_B, output.residual_B)
    ((t, r),) = seen
    assert (t == 1).all()
    torch.testing.assert_close(1 - r, output.t_B)
    assert not r[24:].any()
    assert r[:24].all()
    ones = free_flow(random_network(), GaussianTeacher(0.4, 0.6), correction=1.0)(nothing(8, 2), KEY)
    assert ones.diagnostics["jvp_norm"].isnan().all()
