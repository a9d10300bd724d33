"""Samplers: pure functions of a model, noise and an explicit decreasing time grid. Each counts its own evaluations.

``sample_ode`` integrates a velocity field, ``sample_map`` chains jumps of a flow map, ``sample_renoise`` alternates a
jump to data with fresh noise (consistency students). Noise for sample ``i`` comes from seed and ``i`` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import LINEAR, FlowMap, VelocityField, uniform_grid
from fewstep.keys import Key
from fewstep.sources import Source, gaussian

Solver = Literal["euler", "heun", "midpoint"]


@dataclass(frozen=True)
class Samples:
    """Samples ``x [B, *D]`` at ``t = 0`` and the network evaluations each of them took."""

    x: Tensor
    nfe: int


@dataclass(frozen=True)
class Step:
    """A state ``x [B, *D]`` after one solver step, and the number of field calls the step made."""

    x: Tensor
    calls: int


def euler_step(field: VelocityField, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Step:
    """``x_r = x_t + (r - t) v(x_t, t)``: first order, one call. Equal to DDIM on a matched grid."""
    return Step(x + _difference(r_B, t_B, x) * field(x, t_B, label_B), calls=1)


def heun_step(field: VelocityField, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Step:
    """Trapezoidal rule with an Euler predictor: second order, two calls."""
    h = _difference(r_B, t_B, x)
    v_t = field(x, t_B, label_B)
    v_r = field(x + h * v_t, r_B, label_B)
    return Step(x + h * (v_t + v_r) / 2, calls=2)


def midpoint_step(field: VelocityField, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None) -> Step:
    """Velocity at the middle of the step, reached by half an Euler step: second order, two calls."""
    h = _difference(r_B, t_B, x)
    middle = x + h / 2 * field(x, t_B, label_B)
    return Step(x + h * field(middle, (t_B + r_B) / 2, label_B), calls=2)


SOLVERS: dict[Solver, Callable[..., Step]] = {"euler": euler_step, "heun": heun_step, "midpoint": midpoint_step}


@torch.no_grad()
def sample_ode(
    field: VelocityField,
    noise: Tensor,
    times: Tensor,
    label_B: Condition | None = None,
    solver: Solver = "euler",
) -> Samples:
    """Integrate ``dx/dt = v(x, t)`` from ``noise`` at ``times[0]`` along a decreasing grid ``times [N + 1]``."""
    _check_grid(times)
    step = SOLVERS[solver]
    x, calls = noise, 0
    for t, r in pairwise(times):
        after = step(field, x, _full(t, x), _full(r, x), label_B)
        x, calls = after.x, calls + after.calls
    return Samples(x, calls * field.nfe)


@torch.no_grad()
def sample_map(flow_map: FlowMap, noise: Tensor, times: Tensor, label_B: Condition | None = None) -> Samples:
    """Jump ``times[0] -> times[1] -> ...`` with a flow map. A jump outside its domain is a ``ValueError``."""
    _check_grid(times)
    _check_domain(flow_map, list(pairwise(times.tolist())))
    x, calls = noise, 0
    for t, r in pairwise(times):
        x, calls = flow_map(x, _full(t, x), _full(r, x), label_B), calls + 1
    return Samples(x, calls * flow_map.nfe)


@torch.no_grad()
def sample_renoise(
    flow_map: FlowMap,
    noise: Tensor,
    times: Tensor,
    label_B: Condition | None,
    key: Key,
    index_B: Tensor,
    source: Source = gaussian,
) -> Samples:
    """Multistep consistency sampling (Song et al. 2303.01469, Algorithm 1) on a decreasing grid that ends at 0.

    At each node jump to data, ``xhat = f(x_t, t, 0)``, then go to the next node with fresh noise,
    ``x_r = (1 - r) xhat + r e'``. The noise of sample ``i`` at node ``k`` is keyed by (seed, k, i).
    """
    _check_grid(times)
    if times[-1] != 0:
        raise ValueError(f"a re-noising grid ends at t = 0, got {float(times[-1]):g}")
    _check_domain(flow_map, [(t, 0.0) for t in times[:-1].tolist()])
    x, calls = noise, 0
    for k, (t, r) in enumerate(pairwise(times)):
        data, calls = flow_map(x, _full(t, x), torch.zeros_like(_full(t, x)), label_B), calls + 1
        if r == 0:
            return Samples(data, calls * flow_map.nfe)
        fresh = source(Key(key.seed, k), "renoise", index_B, tuple(x.shape[1:])).to(x)
        x = LINEAR.sample(data, fresh, _full(r, x)).x_t
    raise AssertionError("unreachable: the grid ends at 0")


Window = tuple[float, float]
ALWAYS: Window = (0.0, 1.0)
"""Times from the lower to the higher, both included, in which something acts."""


@torch.no_grad()
def sample_fixed_noise(field: VelocityField, noise: Tensor, times: Tensor, label_B: Condition | None = None) -> Samples:
    """``x_s = (1 - s) xhat + s e``, ``xhat = x_t - t v(x_t, t)`` and ``e`` the first noise (Lee et al.
    2405.20320): every step goes back to the line that the sample began on. On a straight flow it is Euler's.

    From ``times[0] = 1`` along a decreasing grid ``times [N + 1]``; one call per step.
    """
    _check_grid(times)
    if times[0] != 1:
        raise ValueError(f"a fixed noise is that of t = 1, the grid begins at {float(times[0]):g}")
    x = noise
    for t, r in pairwise(times):
        t_B = _full(t, x)
        xhat = LINEAR.data_from_velocity(x, field(x, t_B, label_B), t_B)
        x = LINEAR.sample(xhat, noise, _full(r, x)).x_t
    return Samples(x, (len(times) - 1) * field.nfe)


class Sampler(Protocol):
    """A model together with its sampling rule and the source of its noise: all that evaluation needs to know of it."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> Source: ...

    def check(self, steps: int) -> None:
        """Raise ``ValueError`` if the model was not made for this number of steps."""
        ...

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples: ...


@dataclass(frozen=True)
class OdeSampler:
    """A velocity field under a solver on a uniform grid: any number of steps.

    ``window`` is where its guidance acts, for its name alone.
    """

    field: VelocityField
    solver: Solver = "euler"
    source: Source = gaussian
    window: Window = ALWAYS

    @property
    def name(self) -> str:
        return _name(self.solver, self.window)

    def check(self, steps: int) -> None:
        uniform_grid(steps)

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        return sample_ode(self.field, noise, uniform_grid(steps), label_B, self.solver)


@dataclass(frozen=True)
class MapSampler:
    """Flow maps keyed by the number of steps they serve (0 serves any number), with their rule.

    ``jumps`` chains jumps along a grid; ``renoise`` jumps to data and re-noises between the nodes. A map that knows one
    grid only is sampled on that, every other on a uniform one. ``window`` is where guidance acts, for its name alone.
    """

    maps: dict[int, FlowMap]
    rule: Literal["jumps", "renoise"]
    source: Source = gaussian
    window: Window = ALWAYS

    @property
    def name(self) -> str:
        return _name(self.rule, self.window)

    def check(self, steps: int) -> None:
        uniform_grid(steps)
        if steps not in self.maps and 0 not in self.maps:
            allowed = ", ".join(str(count) for count in sorted(self.maps))
            raise ValueError(f"this student was trained for {allowed} steps, not for {steps}")
        nodes = self._map(steps).domain.grid
        if nodes and len(nodes) != steps + 1:
            raise ValueError(f"this student's grid has {len(nodes) - 1} steps, not {steps}")

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        self.check(steps)
        flow_map = self._map(steps)
        nodes = flow_map.domain.grid
        times = torch.tensor(nodes, dtype=torch.float32) if nodes else uniform_grid(steps)
        if self.rule == "renoise":
            return sample_renoise(flow_map, noise, times, label_B, key, index_B, self.source)
        return sample_map(flow_map, noise, times, label_B)

    def _map(self, steps: int) -> FlowMap:
        return self.maps[steps] if steps in self.maps else self.maps[0]


@dataclass(frozen=True)
class ServedField:
    """A student's velocity field and the numbers of steps that it serves: any (``steps`` 0), exactly ``steps``, or
    ``steps`` and its ``multiples``."""

    field: VelocityField
    steps: int = 0
    multiples: bool = False

    def serves(self, steps: int) -> bool:
        return self.steps == 0 or steps == self.steps or (self.multiples and steps % self.steps == 0)

    def says(self) -> str:
        return f"{self.steps} steps and multiples" if self.multiples else f"{self.steps}" if self.steps else "any"


VelocityRule = Literal["euler", "heun", "midpoint", "fixed_noise"]


@dataclass(frozen=True)
class FieldSampler:
    """Velocity fields of a student by the numbers of steps they serve, on uniform grids.

    Of those that serve a number the one made for most steps is taken. ``rule`` is how a field for any number is
    sampled: by a solver, or with the noise held fixed. One that was made for its own nodes takes Euler steps on them.
    """

    fields: tuple[ServedField, ...]
    rule: VelocityRule = "euler"
    source: Source = gaussian

    @property
    def name(self) -> str:
        return self.rule if any(each.steps == 0 for each in self.fields) else "euler"

    def serving(self, steps: int) -> ServedField:
        """The field for a number of steps; ``ValueError`` if there is none."""
        uniform_grid(steps)
        found = [each for each in self.fields if each.serves(steps)]
        if not found:
            allowed = ", ".join(each.says() for each in sorted(self.fields, key=lambda each: each.steps))
            raise ValueError(f"this student was trained for {allowed}, not for {steps} steps")
        return max(found, key=lambda each: each.steps)

    def check(self, steps: int) -> None:
        self.serving(steps)

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        served, times = self.serving(steps), uniform_grid(steps)
        rule = "euler" if served.steps else self.rule
        if rule == "fixed_noise":
            return sample_fixed_noise(served.field, noise, times, label_B)
        return sample_ode(served.field, noise, times, label_B, rule)


def _name(rule: str, window: Window) -> str:
    """Rows of guidance in two windows are two samplers'."""
    return rule if window == ALWAYS else f"{rule}, guided in [{window[0]:g}, {window[1]:g}]"


def _difference(r_B: Tensor, t_B: Tensor, x: Tensor) -> Tensor:
    return (r_B - t_B).reshape(-1, *([1] * (x.ndim - 1)))


def _full(t: Tensor, x: Tensor) -> Tensor:
    """A scalar time as ``[B]``, in float32 or better whatever the precision of ``x``."""
    dtype = torch.promote_types(torch.float32, x.dtype)
    return torch.full((len(x),), float(t), dtype=dtype, device=x.device)


def _check_grid(times: Tensor) -> None:
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"a time grid is 1-D and strictly decreasing with at least two nodes, got {times.tolist()}")


def _check_domain(flow_map: FlowMap, jumps: list[tuple[float, float]]) -> None:
    for t, r in jumps:
        flow_map.domain.check(t, r)
