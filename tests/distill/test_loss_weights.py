"""What a residual costs: values, gradients, limits, what is learned, and whether the minimiser stays where it is."""

import math

import numpy as np
import pytest
import scores
import tiny
import torch
from torch import Tensor, nn

from fewstep.checkpoint import Tensors
from fewstep.data.dataset import Batch
from fewstep.data.toys import MixtureSpec
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Eulerian, Lagrangian, Split
from fewstep.distill.flow_maps.velocity import TeacherVelocity
from fewstep.distill.flow_maps.weights import (
    AdaptivePower,
    Cauchy,
    Likelihood,
    LogVariance,
    NormalisedTangent,
    PseudoHuber,
    Weight,
    plain,
)
from fewstep.distill.objective import Objective, TargetedObjective
from fewstep.distill.optimise import learning_rate
from fewstep.distill.tangent import end_derivative, forward_derivative
from fewstep.keys import Key
from fewstep.teachers.analytic import MixtureTeacher
from fewstep.times import sorted_pairs, uniform

EXACT = {"rtol": 1e-12, "atol": 1e-14}
DELTA = torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.1, 0.2]], dtype=torch.float64)
"""Squares 25, 1 and .05 over D = 2 coordinates."""
T = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64)
R = torch.tensor([0.2, 0.5, 0.0], dtype=torch.float64)
KEY = Key(3, step=5)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_weights(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def constant_log_variance(weight: Likelihood | Cauchy, value: float) -> None:
    """``lv`` is ``value`` at all times."""
    weight.double()
    weight.log_variance.of_t.outer.bias.data.fill_(value)


def slope(weight: Weight, delta: Tensor = DELTA) -> Tensor:
    """The gradient of each sample's loss in its own deviation."""
    delta = delta.clone().requires_grad_()
    (found,) = torch.autograd.grad(weight(delta, T, R).sum(), delta)
    return found


# ---------------------------------------------------------------------------------------------- values and gradients

VALUES: dict[str, tuple[Weight, Tensor]] = {
    "plain": (plain, f64(12.5, 0.5, 0.025)),
    "power 0": (AdaptivePower(0.0, 3.0), f64(25, 1, 0.05)),
    "power 1/2": (AdaptivePower(0.5, 11.0), f64(25 / 6, 1 / math.sqrt(12), 0.05 / math.sqrt(11.05))),
    "power 1": (AdaptivePower(1.0, 0.25), f64(25 / 25.25, 0.8, 1 / 6)),
    "power 2": (AdaptivePower(2.0, 1.0), f64(25 / 676, 0.25, 0.05 / 1.05**2)),
    # c = 12: sqrt(25 + 144) - 12 = 1.
    "huber": (PseudoHuber(12 / math.sqrt(2)), f64(1, math.sqrt(145) - 12, math.sqrt(144.05) - 12)),
    "normalised": (
        NormalisedTangent(0.5),
        f64(12.5 / (math.sqrt(12.5) + 0.5), 0.5 / (math.sqrt(0.5) + 0.5), 0.025 / (math.sqrt(0.025) + 0.5)),
    ),
}
SLOPES: dict[str, tuple[Weight, Tensor]] = {
    "plain": (plain, f64(1, 1, 1)),
    "power 0": (AdaptivePower(0.0, 3.0), f64(2, 2, 2)),
    "power 1/2": (AdaptivePower(0.5, 11.0), f64(1 / 3, 2 / math.sqrt(12), 2 / math.sqrt(11.05))),
    "power 1": (AdaptivePower(1.0, 0.25), f64(2 / 25.25, 1.6, 2 / 0.3)),
    "huber": (PseudoHuber(12 / math.sqrt(2)), f64(1 / 13, 1 / math.sqrt(145), 1 / math.sqrt(144.05))),
    "normalised": (
        NormalisedTangent(0.5),
        f64(1 / (math.sqrt(12.5) + 0.5), 1 / (math.sqrt(0.5) + 0.5), 1 / (math.sqrt(0.025) + 0.5)),
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_by_hand(case: str) -> None:
    weight, wanted = VALUES[case]
    torch.testing.assert_close(weight(DELTA, T, R), wanted, **EXACT)


@pytest.mark.parametrize("case", SLOPES)
def test_gradients_by_hand(case: str) -> None:
    """All lie along ``Delta``; what is divided by is a constant where it is stopped (adaptive, normalised) and counts
    where it is not (Huber: ``Delta / sqrt(S + c^2)``)."""
    weight, factor = SLOPES[case]
    torch.testing.assert_close(slope(weight), factor[:, None] * DELTA, **EXACT)


@pytest.mark.parametrize("case", VALUES)
def test_a_sample_by_itself_and_in_any_shape(case: str) -> None:
    """Norms are over all but the first dimension; nothing looks at other samples; no deviation costs nothing and has a
    gradient of zero, not NaN."""
    weight = VALUES[case][0]
    images = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = weight(images.flatten(1), T, R)
    torch.testing.assert_close(weight(images, T, R), wanted, **EXACT)
    for b in range(3):
        torch.testing.assert_close(weight(images[b : b + 1], T[:1], R[:1]), wanted[b : b + 1], **EXACT)
    zero = torch.zeros(3, 2, dtype=torch.float64)
    assert torch.equal(weight(zero, T, R), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(slope(weight, zero), zero)


def test_normalised_is_a_regression_on_a_bounded_tangent() -> None:
    """The gradient is that of ``|| u - sg(u - g) ||^2 / D`` with ``g = Delta / (||Delta|| + c)``; about as long for all
    deviations that are large against ``c``, per coordinate whatever their number."""
    weight = NormalisedTangent(0.5)
    u = DELTA.clone().requires_grad_()
    g = DELTA / (DELTA.square().mean(dim=1).sqrt() + 0.5)[:, None]
    (wanted,) = torch.autograd.grad((u - (u - g).detach()).square().mean(dim=1).sum(), u)
    torch.testing.assert_close(slope(weight), wanted, **EXACT)
    for width in (2, 200):
        far = torch.full((3, width), 1e6, dtype=torch.float64)
        torch.testing.assert_close(slope(weight, far) * width, 2 * torch.ones_like(far), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------- limits


def test_huber_is_a_square_near_zero_and_a_norm_far_out() -> None:
    """``S / (2 c)`` and ``sqrt(S) - c``, ``c = scale sqrt(D)``, each to the next order, without cancellation."""
    c, scale = 0.3, 0.3 / math.sqrt(2)
    near, far = 1e-9 * DELTA, 1e6 * DELTA
    square = near.square().sum(dim=1)
    torch.testing.assert_close(PseudoHuber(scale)(near, T, R), square / (2 * c), rtol=1e-14, atol=0)
    torch.testing.assert_close(PseudoHuber(scale)(far, T, R), far.norm(dim=1) - c, rtol=1e-11, atol=0)


def test_power_zero_is_the_square_and_power_one_is_one() -> None:
    torch.testing.assert_close(AdaptivePower(0.0, 1e-2)(DELTA, T, R), 2 * plain(DELTA, T, R), **EXACT)
    torch.testing.assert_close(
        AdaptivePower(1.0, 1e-2)(1e6 * DELTA, T, R), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_likelihood_and_cauchy_by_hand() -> None:
    """At a constant ``lv``; near zero Cauchy's is a ``1 / c``-fold likelihood (less constants), and far out the
    logarithm of the square."""
    lv, c = 0.7, 0.01
    likelihood, cauchy = Likelihood(), Cauchy(c)
    for weight in (likelihood, cauchy):
        constant_log_variance(weight, lv)
    mean = DELTA.square().mean(dim=1)
    scaled = mean * math.exp(-lv)
    torch.testing.assert_close(likelihood(DELTA, T, R), scaled + lv, rtol=1e-12, atol=0)
    torch.testing.assert_close(cauchy(DELTA, T, R), torch.log(scaled + c) + lv / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope(likelihood), math.exp(-lv) * DELTA, **EXACT)
    torch.testing.assert_close(slope(cauchy), DELTA / (mean + c * math.exp(lv))[:, None], **EXACT)
    near, far = 1e-4 * DELTA, 1e4 * DELTA
    torch.testing.assert_close(
        cauchy(near, T, R) - lv / 2 - math.log(c), (likelihood(near, T, R) - lv) / c, rtol=1e-5, atol=1e-13
    )
    torch.testing.assert_close(cauchy(far, T, R), far.square().mean(dim=1).log() - lv / 2, rtol=1e-7, atol=0)
    torch.testing.assert_close(slope(cauchy, near), slope(likelihood, near) / c, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------- the learned log-variance


@pytest.mark.parametrize("build", [Likelihood, lambda: Cauchy(0.01)], ids=["likelihood", "cauchy"])
def test_log_variance_starts_at_zero(build: type[Likelihood]) -> None:
    """So that at first the loss is that of ``lv = 0``, and learning can begin: its gradient is not zero."""
    weight = build()
    assert torch.equal(weight.log_variance(T, R), torch.zeros(3, dtype=torch.float64))
    delta = DELTA.float()
    wanted = plain(delta, T, R) if isinstance(weight, Likelihood) else torch.log(plain(delta, T, R) + 0.01)
    torch.testing.assert_close(weight(delta, T, R), wanted.double())
    weight(delta, T.float(), R.float()).sum().backward()
    for embedding in (weight.log_variance.of_t, weight.log_variance.of_gap):
        assert embedding.outer.weight.grad is not None
        assert embedding.outer.weight.grad.abs().max() > 0


def test_log_variance_is_a_function_of_both_times() -> None:
    lv = random_weights(LogVariance())
    t, r = T.float(), R.float()
    base = lv(t, r)
    assert base.dtype == torch.float32
    assert base.shape == (3,)
    assert (lv(t - 0.1, r) - base).abs().min() > 1e-4
    assert (lv(t, r + 0.1) - base).abs().min() > 1e-4
    # The gap, not r, is its second time: along a constant gap only the first embedding moves.
    moved = lv(t - 0.1, r - 0.1) - base
    torch.testing.assert_close(moved, (lv.of_t(t - 0.1) - lv.of_t(t)).mean(dim=-1), rtol=0, atol=1e-6)


def test_likelihood_is_stationary_at_the_log_of_the_mean_square() -> None:
    """``d/dlv E[e^-lv m + lv] = 1 - e^-lv E[m]``: zero where ``e^lv = E||Delta||^2 / D``, and only there."""
    weight = Likelihood()
    mean = float(DELTA.square().mean())

    def derivative(lv: float) -> float:
        constant_log_variance(weight, lv)
        bias = weight.log_variance.of_t.outer.bias
        (found,) = torch.autograd.grad(weight(DELTA, T, R).mean(), bias)
        return float(found.sum())  # lv is the mean of the biases

    for lv in (-2.0, 0.0, 3.0):
        assert derivative(lv) == pytest.approx(1 - math.exp(-lv) * mean, rel=1e-12)
    assert derivative(math.log(mean)) == pytest.approx(0, abs=1e-14)


def test_cauchy_is_stationary_where_half_of_the_weight_is_left() -> None:
    """``d/dlv = 1/2 - m e^-lv / (m e^-lv + c)``: zero where ``e^lv = m / c`` for deviations of one size, between the
    smallest and the largest of those for several; with a whole ``lv``, as published, it is positive everywhere."""
    weight = Cauchy(0.01)
    mean = DELTA.square().mean(dim=1)

    def derivative(lv: float, delta: Tensor) -> float:
        constant_log_variance(weight, lv)
        bias = weight.log_variance.of_t.outer.bias
        (found,) = torch.autograd.grad(weight(delta, T, R).mean(), bias)
        return float(found.sum())

    for lv in (-3.0, 0.0, 3.0):
        share = mean / (mean + 0.01 * math.exp(lv))
        assert derivative(lv, DELTA) == pytest.approx(float((0.5 - share).mean()), rel=1e-9)
    one_size = DELTA / mean.sqrt()[:, None]
    assert derivative(math.log(1 / 0.01), one_size) == pytest.approx(0, abs=1e-12)
    assert (
        derivative(math.log(float(mean.min()) / 0.01), DELTA)
        < 0
        < derivative(math.log(float(mean.max()) / 0.01), DELTA)
    )


def test_learned_log_variance_is_the_variance_of_the_data() -> None:
    """Trained alone on deviations whose mean square at ``(t, r)`` is ``exp(1.5 t - 3 (t - r) - 1)``, it comes to that
    exponent: root mean square error below .03, and .25 in the corners, of a range above 2.5."""
    torch.manual_seed(0)
    weight = Likelihood()
    optimizer = torch.optim.Adam(weight.parameters(), lr=1e-2)
    pairs = sorted_pairs(uniform)

    def given(step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        times = pairs(Key(0, step), torch.arange(count), torch.ones(count, dtype=torch.bool))
        return times.t, times.r, 1.5 * times.t - 3 * (times.t - times.r) - 1

    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 200)
        t, r, exponent = given(step, 128)
        sign = torch.where(torch.arange(128) % 2 == 0, 1.0, -1.0)
        delta = (sign * (exponent / 2).exp())[:, None].expand(-1, 2)
        optimizer.zero_grad()
        weight(delta, t, r).mean().backward()
        optimizer.step()
    t, r, exponent = given(1000, 2000)
    assert float(exponent.max() - exponent.min()) > 2.5
    assert float((weight.log_variance(t, r) - exponent).abs().max()) < 0.25
    assert float((weight.log_variance(t, r) - exponent).square().mean().sqrt()) < 0.03


# ------------------------------------------------------------------------------------------ where the minimiser stays

SKEWED = MixtureTeacher.from_spec(MixtureSpec(weights=(0.25, 0.75), means=((-1.5,), (0.8,)), stds=(0.2, 0.2)))


def scored(weight: Weight, scale: float = 1.0) -> float:
    """The largest score of the loss's gradient at the exact velocity (times ``scale``), 20,000 rows on the diagonal."""
    index = torch.arange(20_000)
    field = scores.Field(lambda x, t: scale * SKEWED(x, t))
    objective = FlowMapMatching(
        field,
        rule=Eulerian(),
        pairs=sorted_pairs(uniform),
        jump_fraction=0.0,
        derivative=lambda net, x, v, t, r, label: torch.zeros_like(v),  # nothing jumps
        weight=weight,
    )
    objective(Batch(SKEWED.sample(Key(1), index).double(), None, index), KEY).per_sample_B.sum().backward()
    x, v, gradient = (value[:, 0].numpy() for value in (field.x, field.v.detach(), field.v.grad))
    return scores.mean_of(scores.products(x, v, gradient)).score


@pytest.mark.parametrize(
    "weight",
    [plain, AdaptivePower(0.0, 1e-2), random_weights(Likelihood(), scale=0.4)],
    ids=["plain", "power 0", "likelihood"],
)
def test_weights_of_times_alone_leave_the_minimiser(weight: Weight) -> None:
    """At the marginal velocity the gradient has mean zero against ten functions of the state, whatever the learned
    log-variance happens to be; against a field 10 % off it has not."""
    if isinstance(weight, Likelihood):
        lv = weight.log_variance(
            *torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)).sort(0).values.flip(0)
        )
        assert float(lv.detach().std()) > 0.1
    assert scored(weight) < scores.bound(10)
    assert scored(weight, 1.1) > 2 * scores.bound(10)


@pytest.mark.parametrize(
    "weight",
    [AdaptivePower(1.0, 1e-2), AdaptivePower(0.5, 1e-2), PseudoHuber(0.1), NormalisedTangent(0.1), Cauchy(0.01)],
    ids=["power 1", "power 1/2", "huber", "normalised", "cauchy"],
)
def test_weights_of_the_deviation_do_not(weight: Weight) -> None:
    """With targets as noisy as ``e - x`` in one dimension the marginal velocity is not where they come to rest."""
    assert scored(weight) > 3 * scores.bound(10)


def fixed_point(weight: Weight, dimensions: int, start: float = 0.4) -> float:
    """Where a number ``u`` in all coordinates comes to rest that is regressed on targets with coordinates +1 (70 %) or
    -1 (30 %): reweighted least squares, which is Newton's method under weights that are held constant."""
    k = np.arange(dimensions + 1)
    share = torch.tensor([math.comb(dimensions, n) * 0.7**n * 0.3 ** (dimensions - n) for n in k], dtype=torch.float64)
    target = torch.where(torch.arange(dimensions)[None] < torch.arange(dimensions + 1)[:, None], 1.0, -1.0).double()
    u, times = torch.tensor(start, dtype=torch.float64, requires_grad=True), torch.ones(dimensions + 1)
    for _ in range(100):
        loss = (share * weight(u - target, times, times)).sum()
        (first,) = torch.autograd.grad(loss, u, create_graph=True)
        (second,) = torch.autograd.grad(first, u)
        u = (u - first / second).detach().requires_grad_()
    return float(u.detach())


@pytest.mark.parametrize(
    ("power", "dimensions", "wanted"),
    [(0.5, 1, 0.953), (0.75, 1, 0.990), (1, 1, 0.998), (1, 2, 0.997), (1, 4, 0.996), (1, 8, 0.591), (1, 32, 0.427)],
)
def test_the_adaptive_weight_finds_a_mode(power: float, dimensions: int, wanted: float) -> None:
    """Starting from the mean .4, which is where power 0 stays. Many coordinates make it a mean again. The figures are
    roots of the same sums over the number of coordinates that are +1, found by bisection."""
    assert fixed_point(AdaptivePower(power, 1e-2), dimensions) == pytest.approx(wanted, abs=5e-4)
    assert fixed_point(AdaptivePower(0.0, 1e-2), dimensions, start=0.9) == pytest.approx(0.4, abs=1e-12)


def test_the_adaptive_weight_has_other_resting_places() -> None:
    """Redescending: it stays at the lesser mode if it starts there."""
    assert fixed_point(AdaptivePower(1.0, 1e-2), 1, start=-0.95) == pytest.approx(-0.99, abs=0.01)


# ----------------------------------------------------------------------------------------- learned weights in training


def learned(target_decay: float = 0.0) -> FlowMapMatching:
    return FlowMapMatching(
        tiny.student(),
        rule=Lagrangian(end_derivative) if target_decay else Eulerian(),
        velocity=TeacherVelocity(tiny.teacher_field()),
        pairs=sorted_pairs(uniform),
        jump_fraction=0.5,
        derivative=forward_derivative,
        weight=Likelihood(),
        target_decay=target_decay,
    )


NAMES = {
    f"weight.log_variance.{of}.{layer}.{name}"
    for of in ("of_t", "of_gap")
    for layer in ("inner", "outer")
    for name in ("weight", "bias")
}


def copied(state: Tensors) -> Tensors:
    return {name: value.clone() for name, value in state.items()}


def test_what_an_objective_learns_is_its_own() -> None:
    objective = learned()
    assert set(objective.own_parameters()) == NAMES
    assert all(value is objective.get_parameter(name) for name, value in objective.own_parameters().items())
    state = objective.extra_state()
    assert set(state) == NAMES
    assert not any(value.requires_grad for value in state.values())
    assert objective.targets() == ()
    other = learned()
    random_weights(objective.weight)  # type: ignore[arg-type]
    other.load_extra_state(copied(objective.extra_state()))
    assert all(torch.equal(other.extra_state()[name], value) for name, value in objective.extra_state().items())
    assert other.extra_state()["weight.log_variance.of_t.outer.bias"].abs().max() > 0


def test_a_target_and_own_parameters_are_kept_apart() -> None:
    objective, other = learned(0.9), learned(0.9)
    assert set(objective.own_parameters()) == NAMES
    state = objective.extra_state()
    inside = {f"target.{name}" for name in objective.student.state_dict()}
    assert set(state) == NAMES | inside
    random_weights(objective.weight, 1)  # type: ignore[arg-type]
    random_weights(objective.target_network, 2)
    student = copied(other.student.state_dict())
    other.load_extra_state(copied(objective.extra_state()))
    for name, value in objective.extra_state().items():
        assert torch.equal(other.extra_state()[name], value)
    assert all(torch.equal(value, student[name]) for name, value in other.student.state_dict().items())
    # And both follow the module.
    objective.double()
    assert {value.dtype for value in objective.extra_state().values()} == {torch.float64}


@pytest.mark.parametrize("lacks", ["weight.log_variance.of_t.outer.bias", "target."])
def test_a_state_that_lacks_something_is_refused(lacks: str) -> None:
    objective = learned(0.9)
    state = {name: value for name, value in copied(objective.extra_state()).items() if not name.startswith(lacks)}
    with pytest.raises((ValueError, RuntimeError), match=r"extra state|Missing key"):
        objective.load_extra_state(state)


def test_a_state_of_another_objective_is_refused() -> None:
    state = learned(0.9).extra_state()
    with pytest.raises(ValueError, match=r"FlowMapMatching has the extra state \['weight.*got \['target"):
        learned().load_extra_state(state)
    bare = tiny.meanflow()
    with pytest.raises(ValueError, match=r"has no extra state, got \['weight"):
        bare.load_extra_state(learned().extra_state())
    with pytest.raises(ValueError, match=r"has the extra state \['weight.*got \[\]"):
        learned().load_extra_state({})
    assert isinstance(learned(0.9), TargetedObjective)


def by_hand(objective: Objective, steps: int) -> None:
    """AdamW on student and own parameters together, their gradient clipped as one."""
    from fewstep.data.dataset import BatchSource
    from fewstep.data.load import digits

    config = tiny.CONFIG
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=config.betas, weight_decay=config.weight_decay)
    source = BatchSource(digits(), config.batch_size, tiny.SEED, device=torch.device("cpu"))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps)
        optimizer.zero_grad()
        objective(source.batch(step), Key(tiny.SEED, step)).per_sample_B.mean().backward()
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        objective.after_step()


@pytest.mark.parametrize("target_decay", [0.0, 0.9])
def test_own_parameters_are_trained_with_the_student(target_decay: float) -> None:
    """As by a loop written out: weights of both after five steps, of which the clipping has cut every one."""
    trained, wanted = learned(target_decay), learned(target_decay)
    wanted.load_state_dict(trained.state_dict())
    before = copied(trained.extra_state())
    *_, state = tiny.run(trained, 5)
    by_hand(wanted, 5)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    moved = [name for name, value in trained.extra_state().items() if not torch.equal(value, before[name])]
    assert set(moved) >= NAMES
    assert set(state.snapshot(True)["objective"]) == set(before)


def test_a_snapshot_goes_on_with_the_same_bits() -> None:
    """Moments of the own parameters included; what is exported and averaged is the student alone."""
    whole, half, rest = learned(0.9), learned(0.9), learned(0.9)
    for other in (half, rest):
        other.load_extra_state(copied(whole.extra_state()))
    *_, wanted = tiny.run(whole, 8)
    start = {}
    for state in tiny.run(half, 8):
        if state.step == 3:
            start = {group: copied(tensors) for group, tensors in state.snapshot(True).items()}
            break
    random_weights(rest.student)
    random_weights(rest.weight)  # type: ignore[arg-type]
    *_, found = tiny.run(rest, 8, start=start, done=3)
    one, other = wanted.snapshot(True), found.snapshot(True)
    assert one.keys() == other.keys()
    for group, tensors in one.items():
        assert tensors.keys() == other[group].keys()
        for name, value in tensors.items():
            assert torch.equal(value, other[group][name]), (group, name)
    names = set(tiny.student().state_dict())
    assert set(one["student"]) == set(one["ema-0.9"]) == names


def test_a_learned_weight_shows_in_the_loss_and_not_in_the_residual() -> None:
    """``Split`` needs no derivative: also there the raw mean square stays what it is."""
    objective = learned()
    objective.rule = Split("half")
    constant_log_variance(objective.weight, 1.5)  # type: ignore[arg-type]
    objective.double()
    batch = Batch(torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10, torch.arange(16))
    objective.velocity = TeacherVelocity(lambda x, t, label: 0 * x)  # type: ignore[arg-type]
    output = objective(batch, KEY)
    torch.testing.assert_close(output.per_sample_B, output.residual_B * math.exp(-1.5) + 1.5)
