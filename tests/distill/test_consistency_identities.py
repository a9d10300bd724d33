"""What the discrete consistency methods have in common: fixed points on Gaussian data, and where one is another."""

import hashlib
from collections.abc import Callable
from itertools import pairwise

import oracle
import pytest
import tiny
import torch
from family import GAUSSIAN, KEY, ExactStudent, double_noise, gradients, random_batch, random_network, root
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.consistency.config import EasyConsistencyConfig, TruncatedConsistencyConfig
from fewstep.distill.consistency.continuous import ContinuousConsistency
from fewstep.distill.consistency.measures import CoordinateHuber, OutputScale, absolute, one, step_length
from fewstep.distill.consistency.methods import Given, consistency_objective, straight_stage, truncated_stage
from fewstep.distill.consistency.objective import AlongTeacher, ConsistencyMatching, Pairs
from fewstep.distill.consistency.schedules import Constant
from fewstep.distill.consistency.self_corrected import SelfCorrected
from fewstep.distill.consistency.steps import ConstantSteps, GridSteps, Hop, SegmentSteps, even_nodes
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.rules import Discrete
from fewstep.distill.flow_maps.schedules import Constant as ConstantSchedule
from fewstep.distill.tangent import forward_derivative
from fewstep.keys import Key
from fewstep.networks.dropout import Dropout
from fewstep.teachers.analytic import GaussianTeacher
from fewstep.teachers.network import freeze
from fewstep.times import TimePairs

EXACT = {"rtol": 0.0, "atol": 1e-12}


def per_sample(objective: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = objective(batch, KEY).per_sample_B
    return loss


# ------------------------------------------------------------------------------------------ the fixed point of a grid


class Gains(nn.Module):
    """The linear model ``f(x, t_k) = g_k x`` with one gain for each node ``t_k = k / N``, ``k = 1 .. N``."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.full((nodes,), 0.7, dtype=torch.float64))

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        k = (t_B * len(self.gains)).round().long()
        gain = self.gains[(k - 1).clamp(min=0)]
        return ((1 - gain) / t_B.clamp(min=1e-9))[:, None] * x


def every_node(nodes: int, s: float) -> tuple[Batch, Tensor, Callable[[Key, Tensor], Hop]]:
    """Four samples per interval, ``x`` and ``e`` of either sign: every second moment is that of N(0, s^2) and N(0, 1),
    and second moments are all that a linear model's mean square sees of them."""
    x = s * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(nodes)[:, None]
    e = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(nodes)[:, None]
    k = torch.arange(nodes, dtype=torch.float64).repeat_interleave(4)

    def steps(key: Key, index_B: Tensor) -> Hop:
        return Hop(1 - k / nodes, 1 - (k + 1) / nodes, torch.zeros_like(k))

    return Batch(x, None, torch.arange(len(x))), e, steps


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 32])
def test_training_and_distillation_rest_at_the_same_student(nodes: int) -> None:
    """From data and from an exact teacher by Euler: N rounds of Newton's method on each gain carry the boundary value
    to t = 1, where it is that of N Euler steps, .47736 for N = 32 and s = 1/2. There both losses have no gradient."""
    s = 0.5
    batch, e, steps = every_node(nodes, s)
    teacher = AlongTeacher(GaussianTeacher(0.0, s), "euler")
    for nearer in ({}, {"nearer": teacher}):
        student = Gains(nodes)
        objective = ConsistencyMatching(student, steps=steps, unit=step_length, noise=lambda b, k: e, **nearer)
        for _ in range(nodes):
            (slope,) = torch.autograd.grad(per_sample(objective, batch).mean(), student.gains, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), student.gains)
            student.gains.data -= (slope / curvature).detach()
        assert student.gains[-1].item() == pytest.approx(oracle.euler_gain(nodes, s), abs=1e-12)
        for other in ({}, {"nearer": teacher}):
            objective = ConsistencyMatching(student, steps=steps, noise=lambda b, k: e, **other)
            (slope,) = torch.autograd.grad(per_sample(objective, batch).mean(), student.gains)
            assert float(slope.abs().max()) < 1e-12
    assert nodes != 32 or student.gains[-1].item() == pytest.approx(0.47736, abs=5e-6)
    student.gains.data += 0.01
    (slope,) = torch.autograd.grad(per_sample(objective, batch).mean(), student.gains)
    assert float(slope.sum()) > 1e-6


# ------------------------------------------------------------------------------------------------ one method as another


def fixed(t: Tensor, q: Tensor, b: Tensor | float = 0.0) -> Callable[[Key, Tensor], Hop]:
    return lambda key, index: Hop(t, q, torch.zeros_like(t) + b)


def alpha_flow(net: nn.Module, t: Tensor, alpha: float) -> FlowMapMatching:
    return FlowMapMatching(
        net,
        rule=Discrete(ConstantSchedule(alpha)),
        pairs=lambda key, index, jump: TimePairs(t, torch.zeros_like(t)),
        jump_fraction=1.0,
        noise=double_noise,
    )


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.01])
def test_consistency_training_is_alpha_flow_to_data(alpha: float) -> None:
    """``f_t - f_q = -t (F - target_D)``: alpha-Flow at r = 0 with weight t^2, in loss and gradient. Its loss is divided
    by alpha once, so that it goes over into MeanFlow's."""
    net, batch = random_network(), random_batch()
    t = torch.linspace(0.05, 1, 24, dtype=torch.float64)
    ours = per_sample(ConsistencyMatching(net, steps=fixed(t, (1 - alpha) * t), noise=double_noise), batch)
    theirs = alpha * t**2 * per_sample(alpha_flow(net, t, alpha), batch)
    torch.testing.assert_close(ours, theirs, **EXACT)
    for a, b in zip(gradients(ours.sum(), net), gradients(theirs.sum(), net), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_share_of_the_noise_level_as_a_step_of_alpha_flow() -> None:
    """A share ``a`` of sigma taken off is ``alpha = a / (1 + sigma (1 - a))`` of t; in the objective of easy
    consistency tuning as configured, at one time."""
    net, batch = random_network(), random_batch()
    config = EasyConsistencyConfig(stages=4, distance={"kind": "square"}, divide_by="none")
    objective = consistency_objective(config, Given(net, None, double_noise, 8))
    assert isinstance(objective, ConsistencyMatching)
    sigma = 0.7
    time = torch.full((24,), sigma / (1 + sigma), dtype=torch.float64)
    steps = objective.steps
    objective.steps = lambda key, index: Hop(time, steps.nearer(time, 7), 0 * time)
    a = float(1 + 8 / (1 + torch.tensor(sigma).double().exp())) * 2.0**-4
    theirs = alpha_flow(net, time, a / (1 + sigma * (1 - a)))
    wanted = a / (1 + sigma * (1 - a)) * time**2 * per_sample(theirs, batch)
    torch.testing.assert_close(per_sample(objective, batch), wanted, rtol=0, atol=1e-9)


def test_easy_consistency_tuning_begins_as_denoising() -> None:
    """In its first stage targets are the data: the loss is the distance of the data prediction, over sigma."""
    net, batch = random_network(), random_batch()
    config = EasyConsistencyConfig(base=1 + 1e-12, distance={"kind": "square"})
    objective = consistency_objective(config, Given(net, None, double_noise, 800))
    t = objective.steps(KEY, batch.index).t
    e = double_noise(batch, KEY)
    x_t = (1 - t)[:, None] * batch.x + t[:, None] * e
    error = (x_t - t[:, None] * net(x_t, t, 0 * t, None) - batch.x).square().mean(dim=1)
    torch.testing.assert_close(per_sample(objective, batch), error * (1 - t) / t, rtol=1e-9, atol=1e-12)


def test_one_phase_is_consistency_distillation() -> None:
    """To the bit in every draw, and to rounding in loss and gradient; two phases are not."""
    net, batch = random_network(), random_batch()
    teacher = AlongTeacher(GAUSSIAN, "heun")

    def loss(steps: Callable[[Key, Tensor], Hop]) -> Tensor:
        return per_sample(
            ConsistencyMatching(net, steps=steps, nearer=teacher, unit=step_length, noise=double_noise), batch
        )

    distilled, phased = loss(GridSteps(even_nodes, Constant(16))), loss(SegmentSteps((1,), 16))
    torch.testing.assert_close(phased, distilled, **EXACT)
    for a, b in zip(gradients(phased.sum(), net), gradients(distilled.sum(), net), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert not torch.allclose(loss(SegmentSteps((2,), 16)), distilled, rtol=1e-2)


def test_consistency_flow_matching_on_one_segment() -> None:
    """Without its velocity term and far from data it is consistency training with the step 1e-3: by hand, ``t^2 ||F -
    target_D||^2`` with alpha = 1e-3 / t."""
    net, batch = random_network(), random_batch()
    steps = ConstantSteps(1, 1e-3, near_data=0.0)
    hop = steps(KEY, batch.index)
    assert not hop.b.any()
    ours = per_sample(ConsistencyMatching(net, steps=steps, noise=double_noise), batch)
    e = double_noise(batch, KEY)
    t, q = hop.t[:, None], hop.q[:, None]
    x_t, x_q = ((1 - time) * batch.x + time * e for time in (t, q))
    alpha = (t - q) / t
    target = alpha * (e - batch.x) + (1 - alpha) * net(x_q, hop.q, hop.b, None)
    wanted = (t * (net(x_t, hop.t, hop.b, None) - target)).square().mean(dim=1)
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-15)


def test_segments_and_velocities_by_hand() -> None:
    """``f = x - (t - b) F``; the velocity term is off where the target is the end itself; straight targets regress on
    ``e - x`` with weight ``(t - b)^2``."""
    net, batch = random_network(), random_batch(64)
    steps = ConstantSteps(4, 0.05, near_data=0.3)
    hop = steps(KEY, batch.index)
    ours = per_sample(ConsistencyMatching(net, steps=steps, velocity_weight=0.1, noise=double_noise), batch)
    e, t, q, b = double_noise(batch, KEY), hop.t[:, None], hop.q[:, None], hop.b[:, None]
    x_t, x_q = ((1 - time) * batch.x + time * e for time in (t, q))
    here, there = net(x_t, hop.t, hop.b, None), net(x_q, hop.q, hop.b, None)
    wanted = (x_t - (t - b) * here - x_q + (q - b) * there).square().mean(dim=1)
    wanted = wanted + 0.1 * (hop.q > hop.b) * (here - there).square().mean(dim=1)
    assert 10 < int((hop.q > hop.b).sum()) < 54
    torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-10)

    config = tiny.CONSISTENCY["consistency_flow_matching"](segments=4, straight_steps=1)
    straight = per_sample(straight_stage(config, Given(net, None, double_noise, 1)), batch)
    wanted = ((t - b) * (here - (e - batch.x))).square().mean(dim=1)
    torch.testing.assert_close(straight, wanted, **EXACT)


def test_an_exact_chord_has_no_loss() -> None:
    """A straight flow, all data at m: ``F = e - m`` on the way, for any segments."""

    class Chord(nn.Module):
        def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return (x - 0.3) / t_B.clamp(min=1e-12)[:, None]

    batch = Batch(torch.full((200, 1), 0.3, dtype=torch.float64), None, torch.arange(200))
    objective = ConsistencyMatching(Chord(), steps=ConstantSteps(3, 1e-3, 0.1), velocity_weight=1.0, noise=double_noise)
    assert float(per_sample(objective, batch).max()) < 1e-20


# ---------------------------------------------------------------------------------------------------------- truncation


def test_truncation_begins_where_the_first_stage_ended() -> None:
    """With equal networks every row has the first stage's loss at its time, those at the boundary among them; what
    lies below is the frozen network's, and above it is not."""
    net, batch = random_network(), random_batch(64)
    config = TruncatedConsistencyConfig(stages=3)
    given = Given(net, None, double_noise, 30)
    second = truncated_stage(config, given, net)
    assert isinstance(second, ConsistencyMatching)
    hop = second.steps(KEY, batch.index)
    first = consistency_objective(config, given)
    times = first.steps
    first.steps = lambda key, index: Hop(hop.t, times.nearer(hop.t, 29), hop.b)
    assert hop.factor is not None
    torch.testing.assert_close(per_sample(second, batch), hop.factor * per_sample(first, batch), **EXACT)

    class Nowhere(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
            return torch.full_like(x, torch.nan)

    broken = per_sample(truncated_stage(config, given, Nowhere()), batch).isnan()
    assert torch.equal(broken, hop.q < 0.5)
    assert 16 <= int(broken.sum()) < 64


def test_the_frozen_student_stays_as_it_is() -> None:
    """Over five optimiser steps, which move the other one."""
    previous = freeze(tiny.network(two_times=True, seed=2))
    objective = truncated_stage(TruncatedConsistencyConfig(stages=3), tiny.consistency_given(tiny.student()), previous)

    def digest(net: nn.Module) -> str:
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()

    before = digest(previous), digest(objective.student)
    for _ in tiny.run(objective, 5):
        pass
    assert digest(previous) == before[0]
    assert digest(objective.student) != before[1]
    assert all(parameter.grad is None for parameter in previous.parameters())
    assert len(list(objective.parameters())) == len(list(objective.student.parameters()))


# ------------------------------------------------------------------------------------------------------ self-correction


def corrected(student: nn.Module, teacher: GaussianTeacher, **changes: float) -> SelfCorrected:
    settings = {"data_below": 0.0, "outward_weight": 1.0, "target_decay": 0.0, **changes}
    return SelfCorrected(student, teacher=teacher, distance=absolute, noise=double_noise, **settings)


def test_self_correction_rests_at_the_exact_map() -> None:
    """The first two terms fall with the square of the reach, which is what a step of Euler's misses; a wrong map has
    its loss at any reach. Measured slope: 2.0."""
    batch = Batch(GAUSSIAN.sample(Key(1), torch.arange(500), (1,)).double(), None, torch.arange(500))
    exact = ExactStudent(GAUSSIAN)
    losses = [
        float(per_sample(corrected(exact, GAUSSIAN, reach=reach, straight_weight=0.0), batch).detach().mean())
        for reach in (0.02, 0.01, 0.005)
    ]
    assert losses[2] < 1e-4
    for coarse, fine in pairwise(losses):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)
    wrong = corrected(ExactStudent(GAUSSIAN, scale=1.1), GAUSSIAN, reach=0.05, straight_weight=0.0)
    assert float(per_sample(wrong, batch).detach().mean()) > 3e-3


class Shift:
    """A flow that moves everything by ``m``: ``x_t = x_1 + (1 - t) m``, as teacher and as student."""

    nfe = 1
    m = 0.7

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return torch.full_like(x, -self.m)


class ShiftStudent(nn.Module):
    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        return torch.full_like(x, -Shift.m)


def test_a_straight_flow_has_no_loss_at_all() -> None:
    """All three terms; on a curved one (a Gaussian's) the last one has, at the exact map too."""
    batch = random_batch()
    objective = corrected(ShiftStudent(), Shift(), straight_weight=1.0)  # type: ignore[arg-type]
    assert float(per_sample(objective, batch).max()) < 1e-12
    curved = corrected(ExactStudent(GAUSSIAN), GAUSSIAN, straight_weight=1.0)
    output = curved(batch, KEY)
    assert float(output.diagnostics["straight_residual"].mean()) > 1e-3


def test_targets_near_data_are_the_data() -> None:
    """Where ``t - d`` is below ``data_below``, and nowhere else: by hand, the first term alone."""
    net, batch = random_network(), random_batch(64)
    objective = corrected(net, GAUSSIAN, data_below=0.4, outward_weight=0.0, straight_weight=0.0, target_decay=0.5)
    t, inner, outer = objective.times(KEY, batch.index)
    assert (inner <= t).all()
    assert (t <= outer).all()
    assert (inner >= 0).all()
    assert (outer <= 1).all()
    assert float((t - inner).max()) < 0.1
    x_t = (1 - t)[:, None] * batch.x + t[:, None] * double_noise(batch, KEY)
    x_s = x_t - (t - inner)[:, None] * GAUSSIAN(x_t, t)
    target = torch.where(inner[:, None] < 0.4, batch.x, x_s - inner[:, None] * net(x_s, inner, 0 * t, None))
    wanted = (x_t - t[:, None] * net(x_t, t, 0 * t, None) - target).abs().mean(dim=1)
    torch.testing.assert_close(per_sample(objective, batch), wanted, **EXACT)


# ------------------------------------------------------------------------------------------------ what all of them do


class Dropping(nn.Module):
    """A network with dropout that notes whose activations each call dropped."""

    def __init__(self, seen: list[Tensor | None]) -> None:
        super().__init__()
        self.net = tiny.student()
        self.dropout = Dropout(0.5)
        self.seen = seen

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.seen.append(self.dropout.seed_B)
        return self.dropout(self.net(x, t_B, r_B, label_B))


@pytest.mark.parametrize("kind", tiny.CONSISTENCY)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_both_ends_see_the_same_dropout(kind: str, decay: float) -> None:
    """Every call of the student and of its average, the derivative's too, under the masks of its rows."""
    seen: list[Tensor | None] = []
    fields = tiny.CONSISTENCY[kind].model_fields
    settings = {"kind": kind, **({"target_decay": decay} if "target_decay" in fields else {})}
    student = Dropping(seen)
    objective = consistency_objective(tiny.CONSISTENCY[kind].model_validate(settings), tiny.consistency_given(student))
    for net in objective.targets():
        assert isinstance(net, Dropping)
        net.seen = seen
    batch = tiny.digits()
    objective(Batch(batch.samples(torch.arange(8)), torch.arange(8), torch.arange(8)), KEY)
    assert len(seen) >= 2
    assert seen[0] is not None
    assert all(seed is not None and torch.equal(seed, seen[0]) for seed in seen)
    assert student.dropout.seed_B is None


def test_points_that_are_one_have_no_loss_under_dropout() -> None:
    """At q = t the target is the output: only if both dropped the same."""
    t = torch.linspace(0.1, 1, 8)
    objective = ConsistencyMatching(
        Dropping([]), steps=fixed(t, t), nearer=lambda pairs, x_t, hop: x_t, unit=one, target_decay=0.5
    )
    batch = Batch(tiny.digits().samples(torch.arange(8)), torch.arange(8), torch.arange(8))
    assert not per_sample(objective, batch).any()


def test_the_target_has_no_gradient() -> None:
    """The gradient is that of a square against a number."""
    net, batch = random_network(), random_batch()
    t = torch.linspace(0.1, 1, 24, dtype=torch.float64)
    ours = gradients(per_sample(ConsistencyMatching(net, steps=fixed(t, t / 2), noise=double_noise), batch).sum(), net)
    e, time = double_noise(batch, KEY), t[:, None]
    x_t, x_q = (1 - time) * batch.x + time * e, (1 - time / 2) * batch.x + time / 2 * e
    target = (x_q - time / 2 * net(x_q, t / 2, 0 * t, None)).detach()
    theirs = gradients((x_t - time * net(x_t, t, 0 * t, None) - target).square().mean(dim=1).sum(), net)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_distances_and_units_by_hand() -> None:
    delta, t = torch.tensor([[3.0, -4.0], [0.0, 1.0]]), torch.tensor([0.5, 0.75])
    torch.testing.assert_close(absolute(delta, t, t), torch.tensor([3.5, 0.5]))
    wanted = torch.tensor([(18**0.5 - 3 + 5 - 3) / 2, (10**0.5 - 3) / 2])
    torch.testing.assert_close(CoordinateHuber(3.0)(delta, t, t), wanted)
    hop = Hop(t, t / 2, 0 * t)
    torch.testing.assert_close(step_length(hop), torch.tensor([0.25, 0.375]))
    torch.testing.assert_close(OutputScale(0.5)(hop), torch.tensor([0.25 / 1.25, 9 * 0.25 / 9.25]))
    assert torch.equal(one(hop), torch.ones(2))


def test_targets_that_follow_the_grid() -> None:
    """``mu(k)`` of the step moves the average after it."""
    objective = tiny.consistency_method(
        "consistency", velocity="data", schedule="square_root", target_decay=0.9, target_follows_nodes=True, nodes=32
    )
    assert isinstance(objective, ConsistencyMatching)
    for step, intervals in ((0, 3), (10, 23)):
        batch = Batch(tiny.digits().samples(torch.arange(8)), torch.arange(8), torch.arange(8))
        objective(batch, Key(0, step))
        assert objective.steps.intervals(step) == intervals
        assert objective.target_decay == pytest.approx(0.9 ** (4 / intervals))
        online, average = next(objective.student.parameters()), next(objective.target_network.parameters())
        online.data += 1.0
        wanted = average + (1 - objective.target_decay) * (online - average)
        objective.after_step()
        torch.testing.assert_close(average, wanted)


def test_the_teacher_is_asked_in_full_precision() -> None:
    """A step towards data is a difference: under autocast it has float32's digits."""
    asked: list[tuple[torch.dtype, bool]] = []

    class Field:
        nfe = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            asked.append((x.dtype, torch.is_autocast_enabled("cpu")))
            return x

    x = torch.randn(4, 3)
    hop = Hop(torch.ones(4), torch.full((4,), 0.9), torch.zeros(4))
    with torch.autocast("cpu", torch.bfloat16):
        AlongTeacher(Field(), "heun")(Pairs(x, x, None), x, hop)
    assert asked == [(torch.float32, False)] * 2


def test_continuous_consistency_is_the_limit() -> None:
    """The deviation over the step ``h`` is the flow form's ``g`` up to a relative 1.4 h; at two steps."""
    net, batch = random_network(), random_batch()
    t = torch.linspace(0.1, 1, 24, dtype=torch.float64)
    limit = ContinuousConsistency(
        net, form="flow", times=lambda u: t, derivative=forward_derivative, teacher=GAUSSIAN, noise=double_noise
    )
    g = limit(batch, KEY).residual_B.sqrt()
    nearer = AlongTeacher(GAUSSIAN, "euler")
    for h in (1e-3, 1e-4):
        discrete = ConsistencyMatching(net, steps=fixed(t, t - h), nearer=nearer, noise=double_noise)
        assert root(discrete(batch, KEY).residual_B.sqrt() / h / g - 1) == pytest.approx(1.4 * h, rel=0.05)
