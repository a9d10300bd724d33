"""Samplers: measured orders, closed-form gains through the whole evaluation, evaluation counts, and refusals.

Float64 where a number is exact; statistics are deterministic (fixed seeds) with tolerances of four standard errors.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

from fewstep.data.dataset import Dataset
from fewstep.data.toys import MIXTURE_1D, MixtureSpec
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import build_extractor
from fewstep.evaluation.sweep import Candidate, draw, sweep
from fewstep.flow import FlowMap, TimeDomain, VelocityField, uniform_grid
from fewstep.keys import Key
from fewstep.networks.build import build_network
from fewstep.networks.config import MLPConfig
from fewstep.sampling import MapSampler, OdeSampler, Solver, sample_map, sample_ode, sample_renoise
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap
from fewstep.teachers.analytic import ExactMap, GaussianTeacher, MixtureTeacher
from fewstep.teachers.guided import guided
from fewstep.teachers.network import NetworkField

EXACT = {"rtol": 0.0, "atol": 1e-12}
CPU = torch.device("cpu")
LINE = MixtureTeacher.from_spec(MixtureSpec(weights=(0.3, 0.7), means=((-1.5,), (1.0,)), stds=(0.4, 0.25)))
GAUSSIAN = GaussianTeacher(0.3, 0.5)
EULER_FRECHET = {1: 0.25, 2: 0.09, 4: 0.02543, 8: 0.007262, 64: 1.31e-4}
"""Per dimension, for data of std 1/2: (s - P_N)^2."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(time: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), time, dtype=x.dtype)


@dataclass
class CountedField:
    """A velocity field that knows how many rows it was evaluated on."""

    inner: VelocityField
    rows: int = 0
    nfe: int = field(default=1, init=False)

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        return self.inner(x, t_B, label_B)


@dataclass
class CountedMap:
    """A flow map that knows how many rows it was evaluated on, and the times of its calls."""

    inner: FlowMap
    domain: TimeDomain = field(default=TimeDomain("any"))
    nfe: int = 1
    rows: int = 0
    jumps: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        self.jumps.append((float(t_B[0]), float(r_B[0])))
        return self.inner(x, t_B, r_B, label_B)


def random_network(classes: int = 0) -> nn.Module:
    """A two-time network whose every weight counts."""
    net = build_network(MLPConfig(width=16, depth=2), (2,), classes, two_times=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return net.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------ ODE solvers


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    """Slope of log error over log h on the two-component mixture, 32 to 256 steps, against the exact map.

    Not on a Gaussian, where the midpoint rule superconverges. Measured: 0.97, 1.94, 1.94.
    """
    noise = normal(300, 1)
    wanted = LINE.flow_map(noise, at(1.0, noise), at(0.0, noise))
    steps = np.array([32, 64, 128, 256])
    errors = [
        (sample_ode(LINE, noise, uniform_grid(int(n), dtype=torch.float64), solver=solver).x - wanted)
        .square()
        .mean()
        .sqrt()
        .item()
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


def test_one_step_of_each_solver_by_hand() -> None:
    """On v = -t x^2, from t = 1 to 1/2 at x = 2: v = -4."""

    @dataclass(frozen=True)
    class Quadratic:
        nfe: int = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            return -t_B[:, None] * x**2

    x = torch.tensor([[2.0]], dtype=torch.float64)
    times = torch.tensor([1.0, 0.5], dtype=torch.float64)
    # Euler: 2 + 1/2 * 4. Heun: the velocity there is -1/2 * 16 = -8. Midpoint: at t = 3/4, x = 3, it is -6.75.
    for solver, value in (("euler", 4.0), ("heun", 2 + 0.5 * (4 + 8) / 2), ("midpoint", 2 + 0.5 * 6.75)):
        assert sample_ode(Quadratic(), x, times, solver=solver).x.item() == pytest.approx(value, abs=1e-14)


@pytest.mark.parametrize("steps", EULER_FRECHET)
def test_euler_gain_is_exact(steps: int) -> None:
    """N Euler steps take e to m + P_N e; (s - P_N)^2 is the published curve."""
    e = normal(20, 3)
    samples = sample_ode(GAUSSIAN, e, uniform_grid(steps, dtype=torch.float64))
    torch.testing.assert_close(samples.x, 0.3 + oracle.euler_gain(steps, 0.5) * e, **EXACT)
    gain = (samples.x[0, 0] - samples.x[1, 0]) / (e[0, 0] - e[1, 0])
    assert (0.5 - float(gain)) ** 2 == pytest.approx(EULER_FRECHET[steps], rel=4e-3)


def test_euler_curve_through_the_whole_evaluation() -> None:
    """Noise, sampler, features, moments and distance, as a user gets them: the same curve.

    The data are the exact map of the very noise that the sweep draws, so the distance is (s - P_N)^2 times the second
    moment of that noise and holds no sampling error. What remains is float32 (1e-5 of the distance at 64 steps).
    """
    n, seed, shape = 400, 5, (3,)
    teacher = GaussianTeacher(0.0, 0.5)
    noise = Key(seed).normal("noise", torch.arange(n), shape)
    data = Dataset("gaussian", 0.5 * noise, None, 0, kind="points")
    candidate = Candidate("exact", "teacher", "none", OdeSampler(teacher), tuple(EULER_FRECHET), 1.0, "", 0)
    rows, _ = sweep(
        [candidate],
        data,
        [build_extractor("identity")],
        EvaluateConfig(n=n, features=("identity",), batch_size=150),
        seed=seed,
        device=CPU,
    )
    e = noise.double()
    second_moment = float(e.mean(0).square().sum() + torch.cov(e.mT).trace())
    assert second_moment == pytest.approx(3, rel=0.15)
    assert [row.steps for row in rows] == list(EULER_FRECHET)
    for row in rows:
        distance = row.metrics["fd_identity"].value / second_moment
        assert distance == pytest.approx(oracle.euler_frechet(row.steps, 0.5), rel=1e-4)
        assert distance == pytest.approx(EULER_FRECHET[row.steps], rel=4e-3)
        assert row.nfe == row.steps


# --------------------------------------------------------------------------------------------------------- flow maps


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("teacher", [GAUSSIAN, LINE], ids=["gaussian", "mixture"])
def test_exact_jumps_reach_the_endpoint_of_the_ode(teacher: GaussianTeacher | MixtureTeacher, steps: int) -> None:
    """One jump or many. Measured: 3e-15."""
    e = normal(100, 1)
    samples = sample_map(ExactMap(teacher), e, uniform_grid(steps, dtype=torch.float64))
    torch.testing.assert_close(samples.x, teacher.flow_map(e, at(1.0, e), at(0.0, e)), **EXACT)


def test_jumps_follow_the_grid_in_order() -> None:
    counted = CountedMap(ExactMap(GAUSSIAN))
    sample_map(counted, normal(3, 1), torch.tensor([0.9, 0.7, 0.25, 0.1], dtype=torch.float64))
    assert counted.jumps == [(0.9, 0.7), (0.7, 0.25), (0.25, 0.1)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_renoising_keeps_the_distribution(steps: int) -> None:
    """With the exact consistency function the samples are N(m, s^2) for every N, within four standard errors."""
    n, m, s = 200_000, 0.3, 0.5
    index = torch.arange(n)
    noise = Key(0).normal("noise", index, (1,))
    samples = sample_renoise(ExactMap(GaussianTeacher(m, s)), noise, uniform_grid(steps), None, Key(0), index)
    assert samples.nfe == steps
    x = samples.x.double()
    assert float(x.mean()) == pytest.approx(m, abs=4 * s / math.sqrt(n))
    assert float(x.std()) == pytest.approx(s, abs=4 * s / math.sqrt(2 * n))


def test_renoising_by_hand() -> None:
    """Three nodes: fresh noise of node 0, then of node 1, each keyed by (seed, node, index) and by nothing else."""
    index = torch.tensor([4, 9, 2])
    noise, times = normal(3, 2), torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    first, second = (Key(seed=6, step=k).normal("renoise", index, (2,)).double() for k in (0, 1))

    def to_data(x: Tensor, t: float) -> Tensor:
        return GAUSSIAN.flow_map(x, at(t, x), at(0.0, x))

    x = 0.3 * to_data(noise, 1.0) + 0.7 * first
    x = 0.8 * to_data(x, 0.7) + 0.2 * second
    wanted = to_data(x, 0.2)
    for step in (0, 17):  # the key's own step says nothing: a sampler counts its nodes
        samples = sample_renoise(ExactMap(GAUSSIAN), noise, times, None, Key(6, step), index)
        torch.testing.assert_close(samples.x, wanted, **EXACT)
    other = sample_renoise(ExactMap(GAUSSIAN), noise, times, None, Key(7), index)
    assert (other.x - wanted).abs().min() > 1e-3
    order = torch.tensor([2, 0])
    part = sample_renoise(ExactMap(GAUSSIAN), noise[order], times, None, Key(6), index[order])
    torch.testing.assert_close(part.x, wanted[order], **EXACT)


# --------------------------------------------------------------------------------------------- counting, batches, time


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize(("solver", "factor"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_evaluations_of_solvers(solver: Solver, factor: int, steps: int) -> None:
    """What a sampler reports is what the field saw, per sample; guidance doubles it."""
    B, noise, index = 5, torch.ones(5, 1), torch.arange(5)
    counted = CountedField(MixtureTeacher.from_spec(MIXTURE_1D))
    plain = OdeSampler(counted, solver)(steps, noise, None, Key(0), index)
    assert plain.nfe == factor * steps
    assert counted.rows == B * plain.nfe

    counted.rows = 0
    at_two = OdeSampler(guided(counted, 2.0, 3), solver)(steps, noise, index % 3, Key(0), index)
    assert at_two.nfe == 2 * factor * steps
    assert counted.rows == B * at_two.nfe


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("rule", ["jumps", "renoise"])
def test_evaluations_of_maps(rule: str, steps: int) -> None:
    counted = CountedMap(ExactMap(GAUSSIAN))
    noise, index = torch.ones(5, 1), torch.arange(5)
    samples = MapSampler({0: counted}, rule)(steps, noise, None, Key(0), index)
    assert samples.nfe == steps
    assert counted.rows == 5 * steps
    twice = CountedMap(ExactMap(GAUSSIAN), nfe=2)
    assert MapSampler({0: twice}, rule)(steps, noise, None, Key(0), index).nfe == 2 * steps


def test_batches_change_nothing() -> None:
    """Samples of a network in batches of 7 and of 64, with labels, agree to rounding for every rule."""
    net = random_network(classes=3)
    samplers = [
        OdeSampler(NetworkField(net), "heun"),
        OdeSampler(guided(NetworkField(net), 1.5, 3)),
        MapSampler({0: AverageVelocityMap(net)}, "jumps"),
        MapSampler({0: ConsistencyMap(net)}, "renoise"),
    ]
    data = Dataset("points", torch.zeros(10, 2), None, 3, kind="points")
    for sampler in samplers:
        whole, split = (draw(sampler, 4, data, n=64, batch_size=b, seed=1, device=CPU) for b in (64, 7))
        torch.testing.assert_close(split.x, whole.x, rtol=0, atol=1e-5)
        assert torch.equal(split.label, whole.label)
        assert whole.x.std() > 0.1


def test_times_are_float32_or_better() -> None:
    seen: list[torch.dtype] = []

    @dataclass(frozen=True)
    class Recorder:
        nfe: int = 1

        def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
            seen.append(t_B.dtype)
            return torch.zeros_like(x)

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sample_ode(Recorder(), torch.ones(2, 1, dtype=dtype), uniform_grid(1))
    assert seen == [torch.float32, torch.float32, torch.float64]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.5], [[1.0], [0.0]]])
def test_a_grid_decreases(times: list[float] | list[list[float]]) -> None:
    noise, grid = torch.ones(2, 1), torch.tensor(times)
    with pytest.raises(ValueError, match="strictly decreasing"):
        sample_ode(GAUSSIAN, noise, grid)
    with pytest.raises(ValueError, match="strictly decreasing"):
        sample_map(ExactMap(GAUSSIAN), noise, grid)
    with pytest.raises(ValueError, match="strictly decreasing"):
        sample_renoise(ExactMap(GAUSSIAN), noise, grid, None, Key(0), torch.arange(2))


def test_renoising_ends_at_data() -> None:
    with pytest.raises(ValueError, match=r"ends at t = 0, got 0\.1"):
        sample_renoise(ExactMap(GAUSSIAN), torch.ones(1, 1), torch.tensor([1, 0.1]), None, Key(0), torch.arange(1))


def test_jumps_off_the_domain_are_refused_before_any_call() -> None:
    """Also where only the last jump is at fault."""
    noise = torch.ones(2, 1)
    served = CountedMap(ExactMap(GAUSSIAN), TimeDomain("grid", (1.0, 0.5, 0.25, 0.0)))
    with pytest.raises(ValueError, match="consecutive nodes"):
        sample_map(served, noise, torch.tensor([1.0, 0.5, 0.0]))
    assert served.rows == 0
    sample_map(served, noise, torch.tensor([1.0, 0.5, 0.25, 0.0]))
    assert served.rows == 6

    only_data = CountedMap(ExactMap(GAUSSIAN), TimeDomain("to_data"))
    with pytest.raises(ValueError, match="only jumps to data"):
        sample_map(only_data, noise, uniform_grid(2))
    assert only_data.rows == 0
    sample_renoise(only_data, noise, uniform_grid(2), None, Key(0), torch.arange(2))
    assert only_data.jumps == [(1.0, 0.0), (0.5, 0.0)]

    grid = CountedMap(ExactMap(GAUSSIAN), TimeDomain("grid", (1.0, 0.0)))
    with pytest.raises(ValueError, match="consecutive nodes"):
        sample_renoise(grid, noise, uniform_grid(2), None, Key(0), torch.arange(2))
    assert grid.rows == 0


def test_check_of_samplers() -> None:
    exact = ExactMap(GAUSSIAN)
    MapSampler({0: exact}, "jumps").check(7)
    some = MapSampler({8: exact, 2: exact}, "jumps")
    some.check(8)
    with pytest.raises(ValueError, match="trained for 2, 8 steps, not for 4"):
        some.check(4)
    with pytest.raises(ValueError, match="trained for 2, 8 steps, not for 4"):
        some(4, torch.ones(1, 1), None, Key(0), torch.arange(1))
    for sampler in (OdeSampler(GAUSSIAN), MapSampler({0: exact}, "jumps")):
        sampler.check(1)
        with pytest.raises(ValueError, match="at least one step, got 0"):
            sampler.check(0)


def test_a_map_sampler_takes_the_map_of_its_step_count() -> None:
    """Each step count has its own network; the one under 0 serves the rest. The name is the rule's."""
    maps = {0: GaussianTeacher(0.0, 1.0), 2: GaussianTeacher(5.0, 1.0)}
    sampler = MapSampler({steps: ExactMap(teacher) for steps, teacher in maps.items()}, "jumps")
    e = normal(4, 1)
    for steps, shift in ((1, 0), (2, 5), (3, 0)):
        x = sampler(steps, e, None, Key(0), torch.arange(4)).x
        torch.testing.assert_close(x, shift + e, rtol=0, atol=1e-6)  # the sampler's own grid is float32
    assert (sampler.name, OdeSampler(GAUSSIAN, "heun").name) == ("jumps", "heun")
