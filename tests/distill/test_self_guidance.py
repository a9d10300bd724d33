"""Guidance folded into training: one formula for all methods, its fixed point, its window, what networks are told."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import scipy.stats
import scores
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.data.toys import MIXTURE_1D
from fewstep.distill.flow_maps.guidance import NO_GUIDANCE, GuidanceRange, scale_at
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rows import Guided, Rows, bound, without_guidance
from fewstep.distill.flow_maps.rules import Discrete, Eulerian, Lagrangian, Modulated, Rule, Split
from fewstep.distill.flow_maps.schedules import Constant
from fewstep.distill.flow_maps.velocity import (
    ContrastedVelocity,
    SelfGuided,
    TeacherVelocity,
    conditional,
    diagonal,
    guidance_of,
)
from fewstep.distill.tangent import central_difference, end_difference, forward_derivative, path_difference
from fewstep.flow import LINEAR, expand
from fewstep.keys import Key
from fewstep.teachers.analytic import GaussianTeacher, MixtureTeacher
from fewstep.teachers.guided import ClassContrast, WeakContrast
from fewstep.times import jump_rows, sorted_pairs, uniform

NULL = 3
KEY = Key(3, step=5)
CLASSES = MixtureTeacher.from_spec(MIXTURE_1D)
SINGLE = {"rtol": 1e-6, "atol": 1e-6}
"""Scales travel in float32."""


def rows(count: int = 24, seed: int = 0, **changes: Tensor | None) -> Rows:
    """Random states of all three classes in one dimension, float64; every fifth has lost its label."""
    generator = torch.Generator().manual_seed(seed)
    x, v_c = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    t, r = torch.rand(2, count, generator=generator).sort(dim=0).values.flip(0)
    index = torch.arange(count)
    label = torch.where(index % 5 == 4, NULL, index % 3)
    return replace(Rows(x, t, r, label, v_c, index), **changes)  # type: ignore[arg-type]


def labelled(count: int = 24, seed: int = 0) -> Rows:
    return rows(count, seed, label=torch.arange(count) % 3)


class Recorder(nn.Module):
    """A network that answers by a formula of everything it is given, and keeps that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(
        self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None, guidance_B3: Tensor | None = None
    ) -> Tensor:
        self.calls.append((x.detach(), t_B, r_B, label_B, guidance_B3))
        label = 0 * t_B if label_B is None else label_B.to(t_B.dtype)
        told = 0 * t_B if guidance_B3 is None else guidance_B3.to(t_B.dtype) @ torch.tensor([0.3, 0.7, -0.2]).to(t_B)
        return self.scale * (torch.sin(x + expand(label, x)) + expand(t_B * t_B - 0.5 * r_B + told, x))


def u(net: Recorder, given: Rows, label: Tensor) -> Tensor:
    """The stand-in's diagonal."""
    return net(given.x, given.t, given.t, label).detach()


# --------------------------------------------------------------------------------------------------------- one formula


@dataclass(frozen=True)
class Method:
    """A paper's target, the effective scale it is said to have, and the share of the student's own conditional."""

    target: Callable[[Tensor, Tensor, Tensor], Tensor]
    w: float
    mix: float | None


METHODS = {
    "meanflow (1, .5)": Method(lambda v, c, n: v + (1 - 1 - 0.5) * n + 0.5 * c, 1 / (1 - 0.5), 0.5),
    "meanflow (.2, .92)": Method(lambda v, c, n: 0.2 * v + (1 - 0.2 - 0.92) * n + 0.92 * c, 0.2 / (1 - 0.92), 0.92),
    "meanflow without kappa": Method(lambda v, c, n: 2 * v + (1 - 2) * n, 2.0, 0.0),
    "decoupled meanflow .6": Method(lambda v, c, n: v + 0.6 * (c - n), 1 / (1 - 0.6), 0.6),
    "improved meanflow": Method(lambda v, c, n: v + (1 - 1 / 4) * (c - n), 4.0, None),
    "soflow": Method(lambda v, c, n: 0.25 * (v + (3 - 1) * 1 * (v - n)) + (1 - 0.25) * c, 3.0, 0.75),
    "soflow, half faded": Method(lambda v, c, n: 0.25 * (v + (3 - 1) * 0.5 * (v - n)) + 0.75 * c, 2.0, 0.75),
    "terminal velocity": Method(lambda v, c, n: 1.8 * v + (1 - 1.8) * n, 1.8, 0.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_target_is_the_one_formula(name: str) -> None:
    """Row by row, with the effective scale of the table."""
    method, net, given = METHODS[name], Recorder(), labelled()
    assert given.label is not None
    null = torch.full_like(given.label, NULL)
    wanted = method.target(given.v_c, u(net, given, given.label), u(net, given, null))
    found = SelfGuided(NULL, (method.w, 0.0, 1.0), method.mix)(net, given)
    torch.testing.assert_close(found, wanted, **SINGLE)
    assert not found.requires_grad
    assert (found - given.v_c).abs().max() > 0.1
    other = SelfGuided(NULL, (method.w + 0.1, 0.0, 1.0), method.mix)(net, given)
    assert (other - wanted).abs().max() > 1e-3


def guided_field(x: Tensor, t: Tensor, label: Tensor, w: float) -> Tensor:
    null = CLASSES(x, t, torch.full_like(label, NULL))
    return null + w * (CLASSES(x, t, label) - null)


class GuidedStudent(nn.Module):
    """On the diagonal of a class the guided velocity of the mixture, without a class its unguided one."""

    def __init__(self, w: float, off: float = 1.0) -> None:
        super().__init__()
        self.w, self.off = w, off

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor) -> Tensor:
        found = self.off * guided_field(x, t_B, label_B, self.w)
        return torch.where((label_B == NULL)[:, None], CLASSES(x, t_B, label_B), found)


SETTINGS = pytest.mark.parametrize(
    ("w", "mix"), [(2.0, None), (2.5, 0.92), (2.0, 0.5), (1.8, 0.0), (0.5, None), (3.0, 0.75)]
)


def mixed(w: float, mix: float | None) -> float:
    return 1 - 1 / w if mix is None else mix


@SETTINGS
def test_the_guided_velocity_is_the_fixed_point(w: float, mix: float | None) -> None:
    """With the marginal velocity of its class in place of ``e - x`` the target of a guided student is the student, row
    by row. Of one that is off by ``d`` it is off by ``b d``: the map contracts."""
    given = labelled(300, seed=1)
    assert given.label is not None
    given = replace(given, v_c=CLASSES(given.x, given.t, given.label))
    wanted = guided_field(given.x, given.t, given.label, w)
    velocity = SelfGuided(NULL, (w, 0.0, 1.0), mix)
    torch.testing.assert_close(velocity(GuidedStudent(w), given), wanted, rtol=2e-6, atol=2e-6)
    off = velocity(GuidedStudent(w, 1.05), given) - wanted
    torch.testing.assert_close(off, mixed(w, mix) * 0.05 * wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - given.v_c).abs().max() > 0.5


@SETTINGS
def test_regression_comes_to_rest_at_the_guided_velocity(w: float, mix: float | None) -> None:
    """``E[target | x_t, class] = u(c)`` with ``e - x`` from the data: residuals times ten functions of the state, in
    each class, have mean zero; those of a student 5 % off have not
    (40 % where hardly anything of the data is left in the target)."""
    n = 30_000
    index = torch.arange(n)
    label = index % 3
    x = CLASSES.sample(Key(1), index, label).double()
    t = KEY.uniform("time", index)
    point = LINEAR.sample(x, KEY.normal("noise", index, (1,)).double(), t)
    given = Rows(point.x_t, t, t, label, point.v, index)
    velocity = SelfGuided(NULL, (w, 0.0, 1.0), mix)

    def score(student: nn.Module) -> float:
        residual = velocity(student, given) - student(given.x, t, t, label)
        found = 0.0
        for k in range(3):
            own = label == k
            parts = (value[own][:, 0].numpy() for value in (given.x, student(given.x, t, t, label), residual))
            found = max(found, scores.mean_of(scores.products(*parts)).score)
        return found

    assert score(GuidedStudent(w)) < scores.bound(30)
    off = 1.05 if mixed(w, mix) < 0.9 else 1.4  # what is off is damped by 1 - b
    assert score(GuidedStudent(w, off)) > 1.3 * scores.bound(30)


@pytest.mark.parametrize("mix", [None, 0.5, 0.0])
def test_outside_of_the_window_and_without_a_label_it_is_the_conditional_velocity(mix: float | None) -> None:
    """To the bit: ends of the window belong to it."""
    given = rows(40)
    t = given.t.clone()
    t[:4] = torch.tensor([0.25, 0.75, 0.2499, 0.7501])
    given = replace(given, t=t, label=torch.where(torch.arange(40) < 4, 0, given.label))  # type: ignore[arg-type]
    assert given.label is not None
    found = SelfGuided(NULL, (2.5, 0.25, 0.75), mix)(Recorder(), given)
    plain = (t < 0.25) | (t > 0.75) | (given.label == NULL)
    assert 10 < int(plain.sum()) < 35
    assert plain[2]
    assert plain[3]
    assert torch.equal(found[plain], given.v_c[plain])
    assert ((found - given.v_c)[~plain].abs() > 1e-6).all()
    whole = SelfGuided(NULL, (2.5, 0.0, 1.0), mix)(Recorder(), given)
    assert torch.equal(found[~plain], whole[~plain])


def test_scale_one_is_no_guidance() -> None:
    for mix in (None, 0.5, 0.0):
        given = rows()
        assert torch.equal(SelfGuided(NULL, NO_GUIDANCE, mix)(Recorder(), given), given.v_c)


def test_forwards_that_are_made() -> None:
    """Both diagonals; without ``b`` that of no class alone; never with a gradient."""
    given = rows()
    for mix, calls in ((None, 2), (0.5, 2), (0.0, 1)):
        net = Recorder()
        SelfGuided(NULL, (2.0, 0.0, 1.0), mix)(net, given)
        assert len(net.calls) == calls
        for x, t, r, _, told in net.calls:
            assert torch.equal(x, given.x)
            assert torch.equal(t, given.t)
            assert torch.equal(r, given.t)
            assert told is None
        labels = [call[3] for call in net.calls]
        assert labels[0] is not None
        assert (labels[0] == NULL).all()
        assert all(torch.equal(label, given.label) for label in labels[1:])  # type: ignore[arg-type]


def test_the_default_mix_takes_the_conditional_velocity_once() -> None:
    """``a = 1``: the target moves by as much as ``e - x``, whatever the scale."""
    given = labelled()
    for w in (1.5, 3.0, 7.0):
        velocity = SelfGuided(NULL, (w, 0.0, 1.0))
        moved = replace(given, v_c=given.v_c + 1)
        shift = velocity(Recorder(), moved) - velocity(Recorder(), given)
        torch.testing.assert_close(shift, torch.ones_like(shift), **SINGLE)


@pytest.mark.parametrize("mix", [None, 0.4])
def test_rows_have_their_own_guidance(mix: float | None) -> None:
    """Scale and window of each row; the network is told them, and none for the branch without a class."""
    given = labelled()
    told = torch.stack(
        (torch.linspace(1.2, 6, 24), 0.4 * (torch.arange(24) % 2).float(), torch.linspace(0.5, 1, 24)), dim=1
    )
    given = replace(given, guidance_B3=told)
    net = Recorder()
    found = SelfGuided(NULL, (99.0, 0.0, 1.0), mix)(net, given)
    assert torch.equal(net.calls[0][4], torch.tensor([NO_GUIDANCE]).expand(24, 3))  # type: ignore[arg-type]
    assert torch.equal(net.calls[1][4], told)  # type: ignore[arg-type]
    for b in range(24):
        one = SelfGuided(NULL, (99.0, 0.0, 1.0), mix)(net, given[b : b + 1])
        torch.testing.assert_close(found[b : b + 1], one, rtol=1e-12, atol=1e-12)
    active = (told[:, 1] <= given.t) & (given.t <= told[:, 2])
    assert 6 < int(active.sum()) < 24
    torch.testing.assert_close(scale_at(told, given.t), torch.where(active, told[:, 0], 1.0), rtol=0, atol=0)
    assert torch.equal(found[~active], given.v_c[~active])
    assert ((found - given.v_c)[active].abs() > 1e-6).all()


def test_self_guidance_needs_labels() -> None:
    with pytest.raises(ValueError, match="guidance needs labels"):
        SelfGuided(NULL, (2.0, 0.0, 1.0))(Recorder(), rows(label=None))


# ------------------------------------------------------------------------------------------------- frozen velocities

WEAK = GaussianTeacher(0.1, 1.3)


@pytest.mark.parametrize("contrast", [ClassContrast(CLASSES, NULL), WeakContrast(CLASSES, WEAK)], ids=["class", "weak"])
def test_a_contrast_is_guided_by_the_same_scales(contrast: ClassContrast | WeakContrast) -> None:
    """``v_bad + w (v_good - v_bad)``, in the window; outside the good one. By the rows' own scales if there are."""
    given = labelled()
    assert given.label is not None
    good = CLASSES(given.x, given.t, given.label)
    bad = WEAK(given.x, given.t) if isinstance(contrast, WeakContrast) else CLASSES(given.x, given.t)
    net = Recorder()
    found = ContrastedVelocity(contrast, (2.5, 0.3, 0.7))(net, given)
    inside = (given.t >= 0.3) & (given.t <= 0.7)
    assert 3 < int(inside.sum()) < 21
    torch.testing.assert_close(found[inside], (bad + 2.5 * (good - bad))[inside], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[~inside], good[~inside], rtol=1e-12, atol=1e-12)
    assert (good - bad).abs().max() > 0.1
    told = torch.stack((torch.linspace(1, 4, 24), torch.zeros(24), torch.linspace(0, 1, 24)), dim=1)
    found = ContrastedVelocity(contrast, (2.5, 0.3, 0.7))(net, replace(given, guidance_B3=told))
    w = torch.where(given.t <= told[:, 2], told[:, 0], 1.0).double()[:, None]
    torch.testing.assert_close(found, bad + w * (good - bad), rtol=1e-12, atol=1e-12)
    assert net.calls == []


def test_a_contrast_without_labels() -> None:
    """Goes against a weaker field, and not against a class that nobody has named."""
    given = rows(label=None)
    good, bad = CLASSES(given.x, given.t), WEAK(given.x, given.t)
    found = ContrastedVelocity(WeakContrast(CLASSES, WEAK), (3.0, 0.0, 1.0))(Recorder(), given)
    torch.testing.assert_close(found, bad + 3 * (good - bad), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="guidance needs labels"):
        ContrastedVelocity(ClassContrast(CLASSES, NULL), (3.0, 0.0, 1.0))(Recorder(), given)


def test_velocities_without_guidance() -> None:
    """The field's own with the rows' labels; ``e - x``; the network's at ``r = t``. No gradient comes with any."""
    given, net = rows(), Recorder()
    assert torch.equal(TeacherVelocity(CLASSES)(net, given), CLASSES(given.x, given.t, given.label))
    assert conditional(net, given) is given.v_c
    assert net.calls == []

    class Trained(nn.Module):
        nfe = 1

        def __init__(self) -> None:
            super().__init__()
            self.net = Recorder()

        def forward(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return self.net(x, t_B, t_B, label_B)

    found = diagonal(net, given)
    assert not found.requires_grad
    assert torch.equal(found, net(given.x, given.t, given.t, given.label))
    assert not torch.equal(found, net(given.x, given.t, given.r, given.label))
    assert not TeacherVelocity(Trained())(net, given).requires_grad
    contrasted = ContrastedVelocity(WeakContrast(Trained(), CLASSES), (2.0, 0.0, 1.0))
    assert not contrasted(net, given).requires_grad


# -------------------------------------------------------------------------------------------- what a network is told


def test_a_network_without_the_input_is_itself() -> None:
    """So that a compiled one stays compiled."""
    net, given = Recorder(), rows()
    assert bound(net, given) is net
    assert without_guidance(net, given) is net
    told = torch.rand(24, 3)
    given = replace(given, guidance_B3=told)
    for network, wanted in ((bound(net, given), told), (without_guidance(net, given), torch.tensor([NO_GUIDANCE]))):
        assert isinstance(network, Guided)
        network(given.x, given.t, given.r, given.label)
        x, t, r, label, found = net.calls[-1]
        assert torch.equal(found, wanted.expand(24, 3))  # type: ignore[arg-type]
        for one, other in ((x, given.x), (t, given.t), (r, given.r), (label, given.label)):
            assert torch.equal(one, other)  # type: ignore[arg-type]


def test_slices_and_other_places_keep_what_belongs_to_a_row() -> None:
    given = rows(guidance_B3=torch.rand(24, 3))
    part = given[5:9]
    assert len(part) == 4
    for name in ("x", "t", "r", "label", "v_c", "index", "guidance_B3"):
        assert torch.equal(getattr(part, name), getattr(given, name)[5:9])
    moved = part.at(part.x + 1, part.r)
    assert torch.equal(moved.x, part.x + 1)
    assert torch.equal(moved.t, part.r)
    for name in ("r", "label", "v_c", "index", "guidance_B3"):
        assert getattr(moved, name) is getattr(part, name)
    bare = rows(label=None)[2:4]
    assert bare.label is None
    assert bare.guidance_B3 is None


def test_fixed_guidance_is_for_rows_that_say_nothing() -> None:
    assert torch.equal(guidance_of(rows(), (2.0, 0.1, 0.9)), torch.tensor([[2.0, 0.1, 0.9]]).expand(24, 3))
    told = torch.rand(24, 3)
    assert guidance_of(rows(guidance_B3=told), (2.0, 0.1, 0.9)) is told


# ----------------------------------------------------------------------------------------------------- drawn guidance

N = 20_000
KS_BOUND = 1.95 / math.sqrt(N)
"""The 0.1 % point of the Kolmogorov-Smirnov statistic."""


@pytest.mark.parametrize(
    ("power", "distribution"),
    [
        (0.0, lambda w: (w - 1) / 7),
        (1.0, lambda w: torch.log(torch.as_tensor(w)).numpy() / math.log(8)),
        (2.0, lambda w: (1 - 1 / w) / (1 - 1 / 8)),
    ],
)
def test_drawn_scales_have_their_density(power: float, distribution: Callable[[object], object]) -> None:
    """In proportion to ``w^-power`` on [1, 8]; that of another power by a tenth is noticed."""
    drawn = GuidanceRange(1.0, largest=8.0, power=power).draw(KEY, torch.arange(N))
    assert drawn.dtype == torch.float32
    assert drawn.shape == (N, 3)
    scale = drawn[:, 0].double().numpy()
    assert 1 <= scale.min() < 1.01
    assert 7.9 < scale.max() <= 8
    assert scipy.stats.kstest(scale, distribution).statistic < KS_BOUND
    other = GuidanceRange(1.0, largest=8.0, power=power + 0.1).draw(KEY, torch.arange(N))[:, 0].double().numpy()
    assert scipy.stats.kstest(other, distribution).statistic > KS_BOUND
    assert torch.equal(drawn[:, 1:], torch.tensor([[0.0, 1.0]]).expand(N, 2))


def test_drawn_windows_begin_below_and_end_above_the_fixed_one() -> None:
    """``low`` uniform on (0, .4), ``high`` on (.7, 1), independent of each other and of the scale."""
    drawn = GuidanceRange(1.0, 0.4, 0.7, largest=8.0, random_window=True).draw(KEY, torch.arange(N)).double()
    u_N3 = torch.stack((drawn[:, 0].log() / math.log(8), drawn[:, 1] / 0.4, (drawn[:, 2] - 0.7) / 0.3), dim=1)
    for part in u_N3.unbind(1):
        assert scipy.stats.kstest(part.numpy(), "uniform").statistic < KS_BOUND
    between = torch.corrcoef(u_N3.T) - torch.eye(3)
    assert float(between.abs().max()) < 4 / math.sqrt(N)


def test_fixed_guidance_is_not_drawn() -> None:
    drawn = GuidanceRange(2.5, 0.1, 0.75).draw(KEY, torch.arange(5))
    assert torch.equal(drawn, torch.tensor([[2.5, 0.1, 0.75]]).expand(5, 3))


def test_guidance_is_keyed() -> None:
    """By seed, step and index; the window by itself."""
    index = torch.arange(50)
    wide = GuidanceRange(1.0, 0.5, 0.5, largest=8.0, random_window=True)
    drawn = wide.draw(Key(1, 2), index)
    assert torch.equal(wide.draw(Key(1, 2), index[10:20]), drawn[10:20])
    assert torch.equal(wide.draw(Key(1, 2), index.flip(0)), drawn.flip(0))
    assert torch.equal(replace(wide, largest=4.0).draw(Key(1, 2), index)[:, 1:], drawn[:, 1:])
    for key in (Key(2, 2), Key(1, 3)):
        assert ((wide.draw(key, index) - drawn).abs() > 0).all(dim=1).sum() > 45


# ------------------------------------------------------------------------------------- in the regression of the family


def objective(net: nn.Module, rule: Rule | None = None, **settings: object) -> FlowMapMatching:
    given: dict[str, object] = {
        "rule": rule or Eulerian(),
        "pairs": sorted_pairs(uniform),
        "jump_fraction": 0.5,
        "velocity": SelfGuided(NULL, (2.0, 0.0, 1.0)),
        "derivative": central_difference(1e-3),
        "guidance": GuidanceRange(1.0, 0.3, 0.8, largest=8.0, random_window=True),
        "label_dropout": 0.3,
        "null_label": NULL,
        **settings,
    }
    return FlowMapMatching(net, **given)  # type: ignore[arg-type]


def batch(count: int = 40) -> Batch:
    index = torch.arange(count)
    return Batch(CLASSES.sample(Key(1), index).double(), index % 3, index)


def test_rows_that_lost_their_label_are_told_of_no_guidance() -> None:
    given, first = objective(Recorder()).rows(batch(), KEY)
    assert first == 20
    assert given.guidance_B3 is not None
    assert given.label is not None
    lost = given.label == NULL
    assert 2 <= int(lost.sum()) <= 12
    assert torch.equal(given.guidance_B3[lost], torch.tensor([NO_GUIDANCE]).expand(int(lost.sum()), 3))
    drawn = GuidanceRange(1.0, 0.3, 0.8, largest=8.0, random_window=True).draw(KEY, given.index)
    assert torch.equal(given.guidance_B3[~lost], drawn[~lost])
    assert objective(Recorder(), guidance=None).rows(batch(), KEY)[0].guidance_B3 is None
    unlabelled = replace(batch(), label=None)
    drawn_rows, _ = objective(Recorder()).rows(unlabelled, KEY)
    assert torch.equal(drawn_rows.guidance_B3, drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_labels_are_dropped_where_nothing_jumps(share: float) -> None:
    """The given share of these rows, within four standard errors; rows that jump keep theirs."""
    n = 20_000
    given, diagonals = objective(Recorder(), label_dropout=share, jump_fraction=0.25).rows(batch(n), KEY)
    assert given.label is not None
    lost = given.label == NULL
    assert diagonals == 15_000
    assert not lost[diagonals:].any()
    rate = float(lost[:diagonals].double().mean())
    assert rate == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / diagonals))
    assert torch.equal(given.label[~lost], given.index[~lost] % 3)
    assert not (objective(Recorder(), label_dropout=0.0).rows(batch(), KEY)[0].label == NULL).any()


def test_what_a_row_draws_does_not_depend_on_its_neighbours() -> None:
    whole, _ = objective(Recorder()).rows(batch(), KEY)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    everything = batch()
    for part in (order, order[:13]):
        some = Batch(everything.x[part], everything.label[part], everything.index[part])  # type: ignore[index]
        found, _ = objective(Recorder()).rows(some, KEY)
        place = torch.argsort(whole.index)[found.index]
        for name in ("x", "t", "r", "label", "v_c", "guidance_B3"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name)[place], rtol=0, atol=0)


RULES: dict[str, Rule] = {
    "eulerian": Eulerian(),
    "own tangent": Eulerian(tangent=diagonal),
    "discrete": Discrete(Constant(0.3)),
    "discrete in its limit": Discrete(Constant(0.0)),
    "split": Split("random"),
    "half": Split("half", finest=0.25),
    "lagrangian": Lagrangian(end_difference(1e-3)),
    "modulated": Modulated(path_difference(1e-3), Constant(0.5)),
}


@pytest.mark.parametrize("target_decay", [0.0, 0.9])
@pytest.mark.parametrize("name", RULES)
def test_every_call_is_told_the_guidance_of_its_own_rows(name: str, target_decay: float) -> None:
    """All rows, those before the first jump or those from it on; the branch without a class is told of none. Networks
    of the target too."""
    matching = objective(Recorder(), RULES[name], target_decay=target_decay)
    nets = [matching.student, *matching.targets()]
    given, first = matching.rows(batch(), KEY)
    matching(batch(), KEY)
    calls = [call for net in nets for call in net.calls]  # type: ignore[union-attr]
    assert len(calls) >= 3
    parts = {40: given, 20: given[first:]}
    seen = set()
    for x, _, _, label, told in calls:
        ours = parts[len(x)]
        if len(x) == 20 and torch.equal(label, given[:first].label) and torch.equal(x, given[:first].x):
            ours = given[:first]
        if (label == NULL).all():
            assert torch.equal(told, torch.tensor([NO_GUIDANCE]).expand(len(x), 3))
        else:
            assert torch.equal(label, ours.label)
            assert torch.equal(told, ours.guidance_B3)
            seen.add(len(x))
    assert 20 in seen
    if target_decay and name in ("split", "half", "lagrangian"):
        assert len(nets[1].calls) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RULES)
def test_single_rows_have_the_losses_of_the_batch(name: str) -> None:
    """As in microbatches of one, in which nothing jumps or everything does."""
    matching, whole = objective(Recorder(), RULES[name]), batch()
    wanted = matching(whole, KEY).per_sample_B
    assert whole.label is not None
    singles = [
        matching(Batch(whole.x[b], whole.label[b], whole.index[b]), KEY).per_sample_B for b in torch.arange(40).split(1)
    ]
    torch.testing.assert_close(torch.cat(singles).sort().values, wanted.sort().values, rtol=1e-6, atol=1e-7)


@dataclass
class Counting:
    """A velocity that keeps the rows it was asked about."""

    asked: list[Rows] = field(default_factory=list)

    def __call__(self, net: nn.Module, given: Rows) -> Tensor:
        self.asked.append(given)
        return given.v_c


@pytest.mark.parametrize(("name", "count"), [("eulerian", 40), ("discrete", 40), ("split", 20), ("lagrangian", 20)])
def test_the_velocity_is_asked_for_once_and_where_it_is_used(name: str, count: int) -> None:
    velocity = Counting()
    matching = objective(Recorder(), RULES[name], velocity=velocity)
    matching(batch(), KEY)
    assert [len(asked) for asked in velocity.asked] == [count]


def test_a_network_without_the_input_is_called_as_ever() -> None:
    net = Recorder()
    objective(net, guidance=None)(batch(), KEY)
    assert all(call[4] is None for call in net.calls)
    net = Recorder()
    objective(net, derivative=forward_derivative, label_dropout=0.0, velocity=conditional)(batch(), KEY)
    assert all(call[4] is not None for call in net.calls)


def test_target_and_tangent_are_the_guided_velocity() -> None:
    """On rows that jump ``v_g - (t - r) du/dt`` along ``v_g``, on the others ``v_g``: written out."""
    net = Recorder()
    matching = objective(net, derivative=forward_derivative, guidance=None, label_dropout=0.5)
    given, first = matching.rows(batch(), KEY)
    v = SelfGuided(NULL, (2.0, 0.0, 1.0))(net, given)
    tail = given[first:]
    du_dt = forward_derivative(net, tail.x, v[first:], tail.t, tail.r, tail.label)
    target = torch.cat((v[:first], v[first:] - (tail.t - tail.r)[:, None] * du_dt))
    wanted = (net(given.x, given.t, given.r, given.label) - target).square().mean(dim=1)
    torch.testing.assert_close(matching(batch(), KEY).per_sample_B, wanted, rtol=1e-12, atol=1e-12)
    jump = jump_rows(torch.arange(40), 0.5)
    assert torch.equal(given.index, torch.cat((torch.arange(40)[~jump], torch.arange(40)[jump])))
