"""Guidance of teachers: the affine combination, its ends, its cost, and what it refuses. Networks as fields."""

import oracle
import pytest
import torch
from torch import Tensor

from fewstep.data.toys import MIXTURE_1D
from fewstep.flow import VelocityField
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.sampling import sample_ode
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.teachers.guided import ClassContrast, GuidedField, WeakContrast, guided
from fewstep.teachers.network import NetworkField, freeze

EXACT = {"rtol": 0.0, "atol": 1e-12}
CLASSES = MixtureTeacher.from_spec(MIXTURE_1D)
NULL = 3


def points() -> tuple[Tensor, Tensor, Tensor]:
    """States, times and all three labels, in an order that a swapped half would not survive."""
    x = torch.linspace(-2, 2, 42, dtype=torch.float64)[:, None]
    return x, torch.linspace(0.05, 1, 42, dtype=torch.float64).flip(0), torch.arange(42) % 3


def conditional_and_unconditional() -> tuple[Tensor, Tensor]:
    """Both velocities from the oracle: a class of one Gaussian, and the mixture of all three by its score."""
    x, t, label = points()
    w, m, s = (parameter.numpy() for parameter in MIXTURE_1D.tensors())
    v_c, v_u = torch.empty_like(x), torch.empty_like(x)
    for b, (time, k) in enumerate(zip(t.tolist(), label.tolist(), strict=True)):
        state = x[b : b + 1].numpy()
        v_c[b] = torch.from_numpy(oracle.gaussian_velocity(state, time, m[k, 0], s[k]))[0]
        v_u[b] = torch.from_numpy(oracle.mixture_velocity(state, time, w, m, s))[0]
    return v_c, v_u


def test_the_conditionals_differ() -> None:
    v_c, v_u = conditional_and_unconditional()
    assert (v_c - v_u).abs().mean() > 0.1


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_guidance_is_affine(w: float) -> None:
    """``v_u + w (v_c - v_u)``: w = 0 is unconditional, w = 1 conditional."""
    v_c, v_u = conditional_and_unconditional()
    x, t, label = points()
    wanted = {0.0: v_u, 1.0: v_c}.get(w, (1 - w) * v_u + w * v_c)
    torch.testing.assert_close(guided(CLASSES, w, NULL)(x, t, label), wanted, **EXACT)


def test_guidance_acts_in_its_window() -> None:
    """Both ends included, and the conditional velocity elsewhere; two evaluations at every time."""
    v_c, v_u = conditional_and_unconditional()
    x, t, label = points()
    low, high = float(t[30]), float(t[10])
    field = guided(CLASSES, 3.0, NULL, low, high)
    found = field(x, t, label)
    assert torch.equal(found[10:31], guided(CLASSES, 3.0, NULL)(x, t, label)[10:31])
    torch.testing.assert_close(found[10:31], (3 * v_c - 2 * v_u)[10:31], **EXACT)
    torch.testing.assert_close(found[:10], v_c[:10], **EXACT)
    torch.testing.assert_close(found[31:], v_c[31:], **EXACT)
    assert field.nfe == 2
    ends = torch.tensor([0.1, 0.8])  # as a grid gives them: those of float32
    inside = guided(CLASSES, 3.0, NULL, 0.1, 0.8)(x[:2].float(), ends, label[:2])
    assert torch.equal(inside, guided(CLASSES, 3.0, NULL)(x[:2].float(), ends, label[:2]))


def test_scale_one_is_the_field_itself() -> None:
    """No wrapper, no second evaluation, also for a field without classes."""
    assert guided(CLASSES, 1.0, NULL) is CLASSES
    gaussian = GaussianTeacher(0.0, 1.0)
    assert guided(gaussian, 1.0, None) is gaussian
    assert guided(CLASSES, 1, None).nfe == 1


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_doubles_the_evaluations(w: float) -> None:
    field: VelocityField = guided(CLASSES, w, NULL)
    assert isinstance(field, GuidedField)
    assert field.nfe == 2
    assert guided(field, 2.0, NULL).nfe == 4
    x, _, label = points()
    assert sample_ode(field, x, torch.tensor([1.0, 0.5, 0.0]), label).nfe == 4


def test_one_call_on_a_doubled_batch() -> None:
    """The field sees every state and time twice, first under its label, then under the null label."""
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    class Recorder:
        nfe = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            calls.append((x, t_B, label_B))
            return x

    x, t, label = points()
    guided(Recorder(), 2.0, 7)(x, t, label)
    ((states, times, labels),) = calls
    assert torch.equal(states, torch.cat((x, x)))
    assert torch.equal(times, torch.cat((t, t)))
    assert torch.equal(labels, torch.cat((label, torch.full_like(label, 7))))


def test_what_guidance_refuses() -> None:
    x, t, _ = points()
    with pytest.raises(ValueError, match="guidance needs labels"):
        guided(CLASSES, 2.0, NULL)(x, t)
    with pytest.raises(ValueError, match="guidance 2 asked of a teacher without classes"):
        guided(GaussianTeacher(0.0, 1.0), 2.0, None)


def test_a_network_is_a_field_on_its_diagonal() -> None:
    """``v(x, t, c) = net(x, t, r = t, c)``, also of a network of two times; frozen, it takes no gradient."""
    net = build_network(MLPConfig(width=16, depth=1), (1,), NULL, two_times=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    assert freeze(net.train()) is net
    assert not net.training
    x, t, label = (part.float() if part.is_floating_point() else part for part in points())
    v = NetworkField(net)(x, t, label)
    assert not v.requires_grad
    assert torch.equal(v, net(x, t, t, label))
    for other in (net(x, t, 0 * t, label), net(x, t, t)):
        assert (v - other).abs().max() > 1e-2
    assert NetworkField(net).nfe == 1


# Away from a weaker field --------------------------------------------------------------------------------------------


class Noted:
    """A field of known cost that keeps its labels."""

    def __init__(self, gain: float, nfe: int) -> None:
        self.gain, self.nfe = gain, nfe
        self.labels: list[Tensor | None] = []

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.labels.append(label_B)
        return self.gain * x + t_B[:, None]


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance_away_from_a_weaker_field(w: float) -> None:
    """``v_weak + w (v - v_weak)``: both under the same label, or none."""
    x, t, label = points()
    strong, weak = Noted(2.0, nfe=1), Noted(-1.0, nfe=3)
    field: VelocityField = GuidedField(WeakContrast(strong, weak), w)
    torch.testing.assert_close(field(x, t, label), (3 * w - 1) * x + t[:, None], **EXACT)
    torch.testing.assert_close(field(x, t), (3 * w - 1) * x + t[:, None], **EXACT)
    for one in (strong, weak):
        assert one.labels[0] is label
        assert one.labels[1] is None
    assert field.nfe == 4


def test_each_contrast_counts_its_evaluations() -> None:
    assert ClassContrast(Noted(1.0, nfe=3), NULL).nfe == 6
    assert WeakContrast(Noted(1.0, nfe=4), Noted(1.0, nfe=5)).nfe == 9
    x, _, label = points()
    nested = GuidedField(WeakContrast(guided(CLASSES, 2.0, NULL), CLASSES), 1.5)
    assert sample_ode(nested, x, torch.tensor([1.0, 0.5, 0.0]), label).nfe == 6
