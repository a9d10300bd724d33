"""Curvature weighting: the curvature it finds, the weights it makes of it, and that it changes nothing else."""

import math

import numpy as np
import pytest
import scipy.integrate
import tiny
import torch
from scores import Field, bound, mean_of, products
from torch import Tensor, nn

from fewstep import precision
from fewstep.data.dataset import Batch
from fewstep.distill.curvature import BINS, CurvatureWeighting, bin_of
from fewstep.distill.flow_matching import FlowMatching
from fewstep.distill.tangent import Derivative, central_difference, forward_derivative
from fewstep.keys import Key
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.times import Times, jump_rows, logit_normal, uniform

STD, MEAN, DIM = 0.5, 0.3, 4
MIDDLES = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
KEY = Key(2, 7)


class Exact(nn.Module):
    """The exact velocity of N(m, s^2) as a network, with a parameter so that it has an average."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = GaussianTeacher(MEAN, STD)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return self.scale * self.teacher(x, t_B)


def weighting(net: nn.Module | None = None, **changes: object) -> CurvatureWeighting:
    settings = {"power": 0.5, "warmup_steps": 0, "probed": 1.0, "derivative": forward_derivative, **changes}
    return CurvatureWeighting(net or Exact(), **settings)


def kappa_square(t: Tensor) -> Tensor:
    """``s^4 / sd_t^6``: of ``Dv/Dt = s^2 / sd_t^4 (x - mu_t)``."""
    return STD**4 / ((1 - t) ** 2 * STD**2 + t**2) ** 3


def gaussian_batch(count: int, *, labels: bool = False) -> Batch:
    index = torch.arange(count)
    x = MEAN + STD * Key(1).normal("data", index, (DIM,)).double()
    return Batch(x, index % 10 if labels else None, index)


def weighted(net: nn.Module, own: CurvatureWeighting | None, times: Times = uniform) -> FlowMatching:
    return FlowMatching(net, times=times, label_dropout=0.0, null_label=0, weighting=own)


# ------------------------------------------------------------------------------------------------------ the curvature


@pytest.mark.parametrize(
    ("derivative", "near"),
    [(forward_derivative, 1e-12), (central_difference(1e-4), 1e-5)],
    ids=["forward", "difference"],
)
def test_curvature_of_a_gaussian(derivative: Derivative, near: float) -> None:
    """At states one deviation from the mean ``||Dv/Dt||^2 / D`` is its expectation, ``s^4 / sd_t^6``: in the middle of
    every bin to rounding, and by a central difference to its ``h^2``. Its peak is ``(1 + s^2)^3 / s^2`` at
    ``t = s^2 / (1 + s^2)``."""
    own = weighting(derivative=derivative)
    t = torch.cat((MIDDLES, torch.tensor([STD**2 / (1 + STD**2)], dtype=torch.float64)))
    sd = ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    x = ((1 - t) * MEAN)[:, None] + sd[:, None] * signs
    for part in (slice(0, BINS), slice(BINS, None)):
        fresh = weighting(derivative=derivative)
        fresh.observe(x[part], t[part], t[part], None, torch.arange(len(t[part])))
        fresh.after_step(Exact())
        known = fresh.count > 0
        found = fresh.square[known] / fresh.count[known]
        torch.testing.assert_close(found, kappa_square(t[part]), rtol=near, atol=0)
    assert float(found[0]) == pytest.approx((1 + STD**2) ** 3 / STD**2, rel=near)
    assert not own.count.any()


@pytest.mark.parametrize("times", [uniform, logit_normal(-0.5, 0.8)], ids=["uniform", "logit_normal"])
def test_curvature_found_in_training(times: Times) -> None:
    """Through the objective: per bin the mean of ``s^4 / sd_t^6`` over the bin's times, by quadrature over its
    uniforms, within 4.5 standard errors: of a chi-square of ``D`` degrees over ``D`` times a curvature that varies
    over the bin, from 2,048 samples; at most 6 %. At the other end of the times the curvature is a tenth or less."""
    count = BINS * 2048
    own = weighting()
    objective = weighted(Exact(), own, times)
    objective(gaussian_batch(count), KEY)
    objective.after_step()
    # A step leaves a hundredth of what it saw in the sums.
    n = own.count.numpy() * 100
    assert n.sum() == pytest.approx(count, rel=1e-9)
    found = (own.square / own.count).numpy()
    for b in range(BINS):

        def at(u: float, power: int = 1) -> float:
            return float(kappa_square(times(torch.tensor([u], dtype=torch.float64))[0])) ** power

        span = (max(b / BINS, 1e-9), min((b + 1) / BINS, 1 - 1e-9))
        wanted, square = (BINS * scipy.integrate.quad(at, *span, args=(power,))[0] for power in (1, 2))
        error = math.sqrt((square * (1 + 2 / DIM) - wanted**2) / n[b])
        assert abs(found[b] - wanted) < 4.5 * error, b
        assert error < 0.06 * wanted
    assert found[0] > 10 * found[-1]


def test_forward_and_difference_agree_on_a_network() -> None:
    """The two derivatives of the default step, 5e-3: estimates within 1 % in every bin that was seen."""
    found = []
    for derivative in (forward_derivative, central_difference(5e-3)):
        net = tiny.network(two_times=False)
        own = weighting(net, derivative=derivative)
        objective = FlowMatching(net, times=uniform, label_dropout=0.1, null_label=10, weighting=own)
        index = torch.arange(256)
        objective(Batch(Key(1).normal("data", index, (1, 8, 8)), index % 10, index), KEY)
        objective.after_step()
        assert int((own.count > 0).sum()) == BINS
        found.append(own.square / own.count)
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=0)
    assert not torch.equal(found[1], found[0])


def test_differences_are_of_true_float32() -> None:
    """Whatever the training around it lets a GPU do, and only for as long."""
    seen: list[tuple[bool, bool]] = []

    def look(net: nn.Module, x: Tensor, *rest: object) -> Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return torch.zeros_like(x)

    own = weighting(derivative=look)
    batch = gaussian_batch(8)
    t = torch.full((8,), 0.5)
    with precision.products("tf32"):
        own.observe(batch.x, t, t, None, batch.index)
        after = torch.backends.cuda.matmul.allow_tf32
    assert seen == [(False, False)]
    assert after


def test_only_the_probed_share_is_observed() -> None:
    """Rows spread evenly by their index, at their own times: the sums of that part alone."""
    batch, t = gaussian_batch(64), KEY.uniform("time", torch.arange(64))
    whole, part = weighting(probed=0.25), weighting()
    rows = jump_rows(batch.index, 0.25)
    assert int(rows.sum()) == 16
    whole.observe(batch.x, t, t, None, batch.index)
    part.observe(batch.x[rows], t[rows], t[rows], None, batch.index[rows])
    for each in (whole, part):
        each.after_step(Exact())
    assert float(whole.count.sum()) == pytest.approx(0.16, rel=1e-12)
    torch.testing.assert_close(whole.count, part.count, rtol=0, atol=0)
    torch.testing.assert_close(whole.square, part.square, rtol=1e-12, atol=0)


def test_a_part_without_probed_rows_makes_the_same_calls() -> None:
    """A microbatch or a process's share may hold none of the probed rows. It adds nothing to the sums, and calls the
    average as often as the others: where that is sharded, a call is a collective one."""
    calls: list[int] = []

    class Recorder(Exact):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            calls[-1] += 1
            return super().forward(x, t_B, r_B, label_B)

    own = weighting(Recorder(), probed=0.25, derivative=central_difference(1e-3))
    batch, t = gaussian_batch(8), MIDDLES[:8]
    for part in (slice(0, 3), slice(3, 4)):  # row 3 is the probed one of the first four
        calls.append(0)
        own.observe(batch.x[part], t[part], t[part], None, batch.index[part])
    own.after_step(Exact())
    assert float(own.count.sum()) == pytest.approx(0.01)
    assert calls == [3, 3]


def test_a_part_without_probed_rows_adds_nothing() -> None:
    own, batch, t = weighting(probed=0.25), gaussian_batch(8), MIDDLES[:8]
    own.observe(batch.x[:3], t[:3], t[:3], None, batch.index[:3])
    own.after_step(Exact())
    assert not own.count.any()
    assert not own.square.any()


# -------------------------------------------------------------------------------------------------------- the weights


def estimated(square: np.ndarray, count: np.ndarray | None = None, **changes: object) -> CurvatureWeighting:
    own = weighting(**changes)
    own.count = torch.ones(BINS, dtype=torch.float64) if count is None else torch.from_numpy(count)
    own.square = torch.from_numpy(square) * own.count
    return own


def wanted_weights(kappa: np.ndarray, power: float) -> np.ndarray:
    clipped = np.clip((kappa / kappa.mean()) ** power, 0.2, 5)
    return clipped / clipped.mean()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_weights_by_hand(power: float) -> None:
    """``clip((kappa / mean kappa)^power, 1/5, 5)`` over its mean. Mean one to 1e-6, no two more than 25 times apart
    (and at power 2 these are), ones at power 0."""
    rng = np.random.default_rng(0)
    kappa = np.exp(1.5 * rng.standard_normal(BINS))
    own = estimated(kappa**2, rng.uniform(0.1, 30, BINS), power=power)
    weights = own.weights(10).double()
    np.testing.assert_allclose(weights.numpy(), wanted_weights(kappa, power), rtol=1e-6)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    ratio = float(weights.max() / weights.min())
    assert ratio <= 25 * (1 + 1e-6)
    if power == 0:
        assert torch.equal(weights, torch.ones(BINS, dtype=torch.float64))
    if power == 2:
        assert ratio == pytest.approx(25, rel=1e-6)


def test_warmup_raises_the_power() -> None:
    """From none at step 0, where all weights are one, in proportion up to all of it; none without a warm-up."""
    kappa = np.linspace(0.5, 3, BINS)
    own = estimated(kappa**2, power=0.8, warmup_steps=10)
    assert torch.equal(own.weights(0), torch.ones(BINS))
    for step, power in ((1, 0.08), (5, 0.4), (10, 0.8), (1000, 0.8)):
        np.testing.assert_allclose(own.weights(step).numpy(), wanted_weights(kappa, power), rtol=1e-6)
    at_once = estimated(kappa**2, power=0.8, warmup_steps=0)
    np.testing.assert_allclose(at_once.weights(0).numpy(), wanted_weights(kappa, 0.8), rtol=1e-6)


def test_bins_without_an_estimate_have_the_mean_curvature() -> None:
    """Of the known ones. With none known, or none curved, every weight is one."""
    kappa, count = np.linspace(0.5, 3, BINS), np.ones(BINS)
    count[[0, 7, 31]] = 0
    filled = np.where(count > 0, kappa, kappa[count > 0].mean())
    np.testing.assert_allclose(estimated(kappa**2, count).weights(5).numpy(), wanted_weights(filled, 0.5), rtol=1e-6)
    assert torch.equal(weighting().weights(5), torch.ones(BINS))
    assert torch.equal(estimated(np.zeros(BINS)).weights(5), torch.ones(BINS))


def test_bins_are_quantiles_of_the_time() -> None:
    """32 equal parts of (0, 1), whatever the distribution of the times: uniforms, not times, are looked up."""
    u = torch.tensor([2.0**-33, 1 / 32 - 1e-9, 1 / 32, 0.5, 1 - 2.0**-33, 1.0], dtype=torch.float64)
    assert bin_of(u).tolist() == [0, 0, 1, 16, 31, 31]
    kappa = np.linspace(0.5, 3, BINS)
    batch, net = gaussian_batch(200), Exact()
    outputs = [
        weighted(net, own, logit_normal(-1.0, 0.3))(batch, KEY) for own in (None, estimated(kappa**2, probed=0.1))
    ]
    uniforms = KEY.uniform("time", batch.index)
    wanted = torch.from_numpy(wanted_weights(kappa, 0.5)).float()[(uniforms * BINS).long()]
    torch.testing.assert_close(outputs[1].diagnostics["weight"], wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs[1].per_sample_B, outputs[0].per_sample_B * wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs[1].residual_B, outputs[0].residual_B, rtol=0, atol=0)


def test_a_weight_comes_from_the_steps_before() -> None:
    """What a batch shows changes the weights of the next step and not its own, however it is cut up."""
    objective = weighted(Exact(), weighting())
    batch = gaussian_batch(256)
    assert torch.equal(objective(batch, KEY).diagnostics["weight"], torch.ones(256))
    assert torch.equal(objective(batch, KEY).diagnostics["weight"], torch.ones(256))
    objective.after_step()
    assert float(objective(batch, KEY).diagnostics["weight"].std()) > 0.3


def test_minimiser_is_unchanged() -> None:
    """At the exact velocity the gradient of the loss under far from equal weights has mean zero: 100,000 samples at all
    times together, Bonferroni at 1e-3; at a velocity 4 % off it has not."""
    count = 100_000
    batch = Batch((MEAN + STD * Key(1).normal("data", torch.arange(count), (1,))).double(), None, torch.arange(count))

    def score(factor: float) -> float:
        own = estimated(kappa_square(MIDDLES).numpy(), power=1.0, probed=1e-3)
        assert float(own.weights(5).max() / own.weights(5).min()) > 9
        field = Field(lambda x, t: factor * GaussianTeacher(MEAN, STD)(x, t.double()))
        weighted(field, own)(batch, KEY).per_sample_B.sum().backward()
        return mean_of(products(*(value[:, 0].numpy() for value in (field.x, field.v.detach(), field.v.grad)))).score

    assert score(1.0) < bound(10)
    assert score(1.04) > bound(10) + 1


# ------------------------------------------------------------------------------------------- in a training, bit for bit


def adaptive(probed: float = 0.5) -> FlowMatching:
    """A digits network with every part of it: labels, dropped ones, a power that grows."""
    net = tiny.network(two_times=False)
    own = weighting(net, power=1.0, warmup_steps=8, probed=probed, derivative=central_difference(5e-3))
    return FlowMatching(net, times=logit_normal(0.0, 1.0), label_dropout=0.1, null_label=10, weighting=own)


def test_microbatches_are_one_batch() -> None:
    """The sums of four parts are those of the whole, to rounding: the weights of the next step too."""
    whole, parts = adaptive(), adaptive()
    index = torch.arange(64)
    batch = Batch(Key(1).normal("data", index, (1, 8, 8)), index % 10, index)
    for _ in range(2):
        one = whole(batch, Key(0, 100))
        four = [parts(part, Key(0, 100)) for part in batch.split(4)]
        torch.testing.assert_close(
            torch.cat([output.per_sample_B for output in four]), one.per_sample_B, rtol=1e-5, atol=1e-6
        )
        whole.after_step()
        parts.after_step()
    assert torch.equal(parts.weighting.count, whole.weighting.count)
    torch.testing.assert_close(parts.weighting.square, whole.weighting.square, rtol=1e-6, atol=0)


def test_average_follows_the_student() -> None:
    """``average <- .999 average + .001 student`` after each step, from a copy; it is neither trained nor counted, goes
    where the objective goes, and stays in evaluation mode."""
    objective = adaptive()
    net, own = objective.student, objective.weighting
    assert len(list(objective.parameters())) == len(list(net.parameters()))
    assert objective.targets() == (own.net,)
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    for _ in range(3):
        for parameter in net.parameters():
            parameter.data += torch.cos(parameter.data)
        objective.after_step()
        expected = [0.999 * average + 0.001 * p.detach() for average, p in zip(expected, net.parameters(), strict=True)]
    for average, wanted in zip(own.net.parameters(), expected, strict=True):
        torch.testing.assert_close(average, wanted, rtol=1e-5, atol=1e-6)
        assert not average.requires_grad
    objective.train()
    assert not own.net.training
    objective.double()
    assert {p.dtype for p in own.net.parameters()} == {torch.float64}


def test_estimates_forget() -> None:
    """Sums lose a hundredth per step: after many steps of one curvature and then k of another, the estimate is the mean
    of the two with weights ``.99^k`` and the rest."""
    own, t = weighting(derivative=central_difference(1e-3)), MIDDLES
    x = torch.full((BINS, 1), 2.0, dtype=torch.float64)

    def step(scale: float) -> None:
        with torch.no_grad():
            own.net.scale.fill_(scale)
        own.observe(x, t, t, None, torch.arange(BINS))
        own.smoothing, own.decay = 0.99, 1.0
        own.after_step(Exact())

    step(0.5)
    first = (own.square / own.count).clone()
    for _ in range(99):
        step(0.5)
    total = own.count.clone()
    torch.testing.assert_close(total, torch.full_like(total, 1 - 0.99**100), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.square / own.count, first, rtol=1e-12, atol=0)
    other = weighting(derivative=central_difference(1e-3))
    other.net.scale.data.fill_(1.0)
    other.observe(x, t, t, None, torch.arange(BINS))
    other.after_step(Exact())
    second = other.square / other.count
    for _ in range(10):
        step(1.0)
    wanted = (0.99**10 * total * first + (1 - 0.99**10) * second) / (0.99**10 * total + 1 - 0.99**10)
    torch.testing.assert_close(own.square / own.count, wanted, rtol=1e-12, atol=0)


def test_a_resumed_training_has_the_same_bits() -> None:
    """Ten steps at once, and five and five by an objective that starts from other weights, estimates and average: the
    last snapshots agree in every tensor, the estimates and the average among them."""
    whole = {}
    for state in tiny.run(adaptive(), 10):
        groups = {g: {n: v.clone() for n, v in tensors.items()} for g, tensors in state.snapshot(True).items()}
        whole[state.step] = groups
    assert {"square", "count"} < set(whole[5]["objective"])
    other = adaptive()
    for parameter in (*other.student.parameters(), *other.weighting.net.parameters()):
        parameter.data.add_(1.0)
    other.weighting.square += 1
    other.weighting.count += 1
    *_, state = tiny.run(other, 10, start=whole[5], done=5)
    again = state.snapshot(True)
    assert again.keys() == whole[10].keys()
    for group, tensors in whole[10].items():
        for name, value in tensors.items():
            assert torch.equal(again[group][name], value), (group, name)


def test_weights_change_a_training() -> None:
    """Control of the above: the tenth loss is another one without the weighting, and the first is the same."""
    losses = []
    for objective in (adaptive(), tiny.flow_matching()):
        losses.append([state.loss for state in tiny.run(objective, 10)])
    assert losses[0][0] == losses[1][0]
    assert losses[0][9] != pytest.approx(losses[1][9], rel=1e-4)


def test_an_objective_without_weighting_takes_no_state() -> None:
    plain = tiny.flow_matching()
    assert plain.extra_state() == {}
    assert plain.targets() == ()
    plain.load_extra_state({})
    with pytest.raises(ValueError, match="no extra state"):
        plain.load_extra_state({"square": torch.ones(1)})
