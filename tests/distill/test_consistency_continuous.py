"""Continuous-time consistency models: zero at the exact map, the same in both forms, MeanFlow in one of them."""

from typing import Any

import pytest
import torch
from family import (
    GAUSSIAN,
    KEY,
    TEACHERS,
    Exact,
    ExactStudent,
    data,
    double_noise,
    gradients,
    random_batch,
    random_network,
    root,
)
from torch import Tensor, nn

from fewstep.distill.consistency.continuous import ContinuousConsistency, Form
from fewstep.distill.consistency.trigflow import Angle
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Eulerian
from fewstep.distill.flow_maps.weights import Likelihood, plain
from fewstep.distill.tangent import central_difference, forward_derivative
from fewstep.keys import Key
from fewstep.times import TimePairs

EXACT = {"rtol": 0.0, "atol": 1e-10}
FORMS = pytest.mark.parametrize("form", ["trigflow", "flow"])


def even(u: Tensor) -> Tensor:
    """Times between .05 and .95, exact in float32."""
    return ((u * 230).floor() + 13) / 256


def continuous(student: nn.Module, form: Form, **changes: Any) -> ContinuousConsistency:
    settings = {
        "times": even,
        "derivative": forward_derivative,
        "normalise": 0.0,
        "weight": plain,
        "noise": double_noise,
        **changes,
    }
    return ContinuousConsistency(student, form=form, **settings)


def g_of(objective: ContinuousConsistency, x_t: Tensor, v: Tensor, t: Tensor, k: float = 1.0) -> Tensor:
    net = objective.student
    slope = forward_derivative(net, x_t, v, t, 0 * t, None)
    return objective.tangent(x_t, v, t, net(x_t, t, 0 * t, None), slope, k).g


@TEACHERS
@FORMS
@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_the_exact_map_rests(teacher: Exact, form: Form, data_std: float) -> None:
    """Pointwise, with the teacher's velocity. Measured: 7e-16 on the Gaussian, 3e-15 on the mixture, and 5e-6 by
    differences of 1e-3. From data only the mean of the deviation vanishes."""
    batch = data(teacher, 400)
    exact = ExactStudent(teacher)
    output = continuous(exact, form, teacher=teacher, data_std=data_std)(batch, KEY)
    assert float(output.residual_B.max().sqrt()) < 1e-12
    by_difference = continuous(exact, form, teacher=teacher, derivative=central_difference(1e-3))(batch, KEY)
    assert 1e-9 < float(by_difference.residual_B.mean().sqrt()) < 1e-4
    assert float(continuous(exact, form)(batch, KEY).residual_B.mean()) > 1e-2


@TEACHERS
@FORMS
def test_a_perturbed_map_is_sent_back(teacher: Exact, form: Form) -> None:
    """A tenth too long or too short: a positive residual, and a gradient that points to the exact one."""
    batch = data(teacher, 400)
    for scale in (0.9, 1.1):
        student = ExactStudent(teacher, scale)
        output = continuous(student, form, teacher=teacher)(batch, KEY)
        assert float(output.residual_B.mean()) > 1e-4
        (slope,) = torch.autograd.grad(output.per_sample_B.mean(), student.scale)
        assert float(slope) * (scale - 1) > 0


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_the_forms_agree(data_std: float) -> None:
    """``g_trig = s (1 - t) / c g_flow`` and ``dG = s / c dF``: gradients differ by ``(s / c)^2 (1 - t)``, per sample,
    and by the prior weight ``(1 - t) / t``."""
    net, batch = random_network(), random_batch(1)
    flow, trig = (continuous(net, form, data_std=data_std) for form in ("flow", "trigflow"))
    for step in range(4):
        key = Key(7, step)
        t = flow(batch, key).t_B
        phi = torch.atan2(t, data_std * (1 - t))
        c = phi.cos() + data_std * phi.sin()
        factor = data_std * (1 - t) / c
        a, b = flow(batch, key), trig(batch, key)
        torch.testing.assert_close(b.residual_B, factor**2 * a.residual_B, rtol=1e-9, atol=0)
        ratio = (data_std / c) ** 2 * (1 - t) * (1 - t) / t
        for x, y in zip(gradients(b.per_sample_B.sum(), net), gradients(a.per_sample_B.sum(), net), strict=True):
            torch.testing.assert_close(x, ratio * y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_trigflow_by_its_own_derivative(k: float) -> None:
    """As the paper prints it: a network ``G(z, phi)`` around the flow's, one product with the tangents ``(cos sin D,
    cos sin)``, ``g = -cos^2 (G - D) - k (cos sin z + that product)``."""
    net, batch, s = random_network(), random_batch(), 0.5
    t = torch.linspace(0.05, 0.95, 24, dtype=torch.float64)
    phi = torch.atan2(t, s * (1 - t))
    x, e = batch.x, double_noise(batch, KEY)
    sin, cos = phi.sin()[:, None], phi.cos()[:, None]
    z, d = cos * x + s * sin * e, s * cos * e - sin * x

    def wrapped(z: Tensor, phi: Tensor) -> Tensor:
        sin, cos = phi.sin(), phi.cos()
        time = s * sin / (cos + s * sin)
        x_t = z / (cos + s * sin)[:, None]
        f = x_t - time[:, None] * net(x_t, time, 0 * time, None)
        return (cos[:, None] * z - f) / sin[:, None]

    G, slope = torch.func.jvp(wrapped, (z, phi), (cos * sin * d, (cos * sin)[:, 0]))
    wanted = -(cos**2) * (G - d) - k * (cos * sin * z + slope)
    x_t = (1 - t)[:, None] * x + t[:, None] * e
    found = g_of(continuous(net, "trigflow"), x_t, e - x, t, k)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    at = Angle.at(t, x, s)
    torch.testing.assert_close(at.scale * x_t, z, **EXACT)
    torch.testing.assert_close(at.velocity(x_t, e - x), d, **EXACT)
    torch.testing.assert_close(at.velocity(x_t, net(x_t, t, 0 * t, None)), G, rtol=1e-9, atol=1e-9)


def test_the_flow_form_is_meanflow_to_data() -> None:
    """Loss and gradient, with r = 0 in every row."""
    net, batch = random_network(), random_batch()
    t = even(KEY.uniform("time", batch.index))
    meanflow = FlowMapMatching(
        net,
        rule=Eulerian(),
        pairs=lambda key, index, jump: TimePairs(t, 0 * t),
        jump_fraction=1.0,
        derivative=forward_derivative,
        noise=double_noise,
    )
    ours, theirs = (each(batch, KEY).per_sample_B for each in (continuous(net, "flow"), meanflow))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for a, b in zip(gradients(ours.sum(), net), gradients(theirs.sum(), net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)


def test_warm_up() -> None:
    """Linear in the step up to one; of no length it is over, at step 0 too."""
    net = random_network()
    assert [continuous(net, "flow", warmup_steps=100).warmed(k) for k in (0, 25, 100, 5000)] == [0.0, 0.25, 1.0, 1.0]
    assert continuous(net, "flow", warmup_steps=0).warmed(0) == 1.0
    batch = random_batch()
    without = continuous(net, "flow", warmup_steps=10)(batch, Key(3, 0))
    t = without.t_B
    e = Key(3, 0).normal("noise", batch.index, (3,)).double()
    x_t = (1 - t)[:, None] * batch.x + t[:, None] * e
    wanted = (net(x_t, t, 0 * t, None) - (e - batch.x)).square().mean(dim=1)
    torch.testing.assert_close(without.per_sample_B, wanted, rtol=1e-9, atol=1e-10)
    whole = continuous(net, "flow", warmup_steps=0)(batch, Key(3, 0)).per_sample_B
    assert whole.isfinite().all()
    assert not torch.allclose(whole, wanted, rtol=1e-2)


@FORMS
def test_tangents_have_about_one_length(form: Form) -> None:
    """``g / (||g|| + c)`` per coordinate, and the gradient of regressing on it."""
    net, batch = random_network(), random_batch()
    caught: list[Tensor] = []

    def weight(delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        caught.append(delta)
        return delta.square().mean(dim=1)

    output = continuous(net, form, normalise=0.1, weight=weight)(batch, KEY)
    length = output.residual_B.sqrt()
    t = output.t_B
    prior = ((1 - t) / t).sqrt() if form == "trigflow" else torch.ones_like(t)
    found = caught[0].detach().square().mean(dim=1).sqrt()
    torch.testing.assert_close(found, prior * length / (length + 0.1), rtol=1e-9, atol=1e-12)


def test_learned_weight() -> None:
    """One number per time beside the student; zero at first, so that the loss is the plain one."""
    net, batch = random_network(), random_batch()
    learned = continuous(net, "trigflow", teacher=GAUSSIAN, weight=None)
    assert isinstance(learned.weight, Likelihood)
    assert {name.split(".")[0] for name in learned.own_parameters()} == {"weight"}
    wanted = continuous(net, "trigflow", teacher=GAUSSIAN)(batch, KEY).per_sample_B
    torch.testing.assert_close(learned(batch, KEY).per_sample_B, wanted, rtol=1e-6, atol=1e-9)


def test_the_derivative_is_along_the_velocity_that_is_regressed_on() -> None:
    """A teacher's in distillation, never the line from data to noise."""
    seen: list[Tensor] = []

    def derivative(net: Any, x: Tensor, v: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        seen.append(v - GAUSSIAN(x, t))
        return 0 * x

    continuous(random_network(), "trigflow", teacher=GAUSSIAN, derivative=derivative)(random_batch(), KEY)
    assert root(seen[0]) == 0
    continuous(random_network(), "trigflow", derivative=derivative)(random_batch(), KEY)
    assert root(seen[1]) > 0.1
