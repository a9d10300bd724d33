"""Samplers: pure functions of a model, noise and an explicit decreasing time grid. Each counts its own evaluations.

``sample_ode`` integrates a velocity field, ``sample_map`` chains jumps of a flow map, ``sample_renoise`` alternates a
jump to data with fresh noise (consistency students). Noise for sample ``i`` comes from seed and ``i`` alone.

Nothing is read back from the device of the samples: a grid on the CPU is checked there once, as numbers, and its times
are filled in where they are needed.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import LINEAR, FlowMap, VelocityField, unchecked, uniform_grid
from fewstep.keys import Key, StepsKey
from fewstep.sources import SOURCES, Source, gaussian

Solver = Literal["euler", "heun", "midpoint"]

Times = Tensor | Sequence[float]
"""A decreasing grid ``[N + 1]``: numbers, or a tensor of one dimension. One on a GPU costs a synchronisation."""


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
    times: Times,
    label_B: Condition | None = None,
    solver: Solver = "euler",
) -> Samples:
    """Integrate ``dx/dt = v(x, t)`` from ``noise`` at ``times[0]`` along a decreasing grid ``times [N + 1]``."""
    nodes = _checked(times)
    step = SOLVERS[solver]
    x, calls, t_B = noise, 0, _full(nodes[0], noise)
    for r in nodes[1:]:
        r_B = _full(r, noise)
        after = step(field, x, t_B, r_B, label_B)
        x, calls, t_B = after.x, calls + after.calls, r_B
    return Samples(x, calls * field.nfe)


@torch.no_grad()
def sample_map(flow_map: FlowMap, noise: Tensor, times: Times, label_B: Condition | None = None) -> Samples:
    """Jump ``times[0] -> times[1] -> ...`` with a flow map. A jump outside its domain is a ``ValueError``."""
    nodes = _checked(times)
    jump = _jump(flow_map, pairwise(nodes))
    x, t_B = noise, _full(nodes[0], noise)
    for r in nodes[1:]:
        r_B = _full(r, noise)
        x, t_B = jump(x, t_B, r_B, label_B), r_B
    return Samples(x, (len(nodes) - 1) * flow_map.nfe)


@torch.no_grad()
def sample_renoise(
    flow_map: FlowMap,
    noise: Tensor,
    times: Times,
    label_B: Condition | None,
    key: Key,
    index_B: Tensor,
    source: Source = gaussian,
) -> Samples:
    """Multistep consistency sampling (Song et al. 2303.01469, Algorithm 1) on a decreasing grid that ends at 0.

    At each node jump to data, ``xhat = f(x_t, t, 0)``, then go to the next node with fresh noise,
    ``x_r = (1 - r) xhat + r e'``. The noise of sample ``i`` at node ``k`` is keyed by (seed, k, i).
    """
    nodes = _checked(times)
    if nodes[-1] != 0:
        raise ValueError(f"a re-noising grid ends at t = 0, got {nodes[-1]:g}")
    jump = _jump(flow_map, [(t, 0.0) for t in nodes[:-1]])
    x, zero_B, t_B = noise, _full(0.0, noise), _full(nodes[0], noise)
    fresh = fresh_noise(source, key.seed, index_B, tuple(x.shape[1:]), len(nodes) - 2)
    for k, r in enumerate(nodes[1:]):
        data = jump(x, t_B, zero_B, label_B)
        if r == 0:
            return Samples(data, (k + 1) * flow_map.nfe)
        t_B = _full(r, noise)
        x = LINEAR.state(data, next(fresh).to(x), t_B)
    raise AssertionError("unreachable: the grid ends at 0")


AT_ONCE = 2**16
"""So many numbers cost hardly more than one."""


def fresh_noise(
    source: Source, seed: int, index_B: Tensor, shape: tuple[int, ...], count: int
) -> Generator[Tensor, None, None]:
    """The noise ``[B, *shape]`` that ``sample_renoise`` takes at its nodes ``0 .. count - 1``.

    Keyed noise is the same whatever is drawn with it: of small batches, all nodes are drawn at once. Another source
    may count its calls, and is called for one node after the other.
    """
    if source not in SOURCES.values() or count * len(index_B) * math.prod(shape) > AT_ONCE:
        for k in range(count):
            yield source(Key(seed, k), "renoise", index_B, shape)
        return
    step_B = torch.arange(count, device=index_B.device)[:, None].expand(-1, len(index_B)).flatten()
    drawn = source(StepsKey(seed, step_B=step_B), "renoise", index_B.repeat(count), shape)
    yield from drawn.reshape(count, len(index_B), *shape)


Window = tuple[float, float]
ALWAYS: Window = (0.0, 1.0)
"""Times from the lower to the higher, both included, in which something acts."""


@torch.no_grad()
def sample_fixed_noise(field: VelocityField, noise: Tensor, times: Times, label_B: Condition | None = None) -> Samples:
    """``x_s = (1 - s) xhat + s e``, ``xhat = x_t - t v(x_t, t)`` and ``e`` the first noise (Lee et al.
    2405.20320): every step goes back to the line that the sample began on. On a straight flow it is Euler's.

    From ``times[0] = 1`` along a decreasing grid ``times [N + 1]``; one call per step.
    """
    nodes = _checked(times)
    if nodes[0] != 1:
        raise ValueError(f"a fixed noise is that of t = 1, the grid begins at {nodes[0]:g}")
    x, t_B = noise, _full(1.0, noise)
    for r in nodes[1:]:
        xhat = LINEAR.data_from_velocity(x, field(x, t_B, label_B), t_B)
        t_B = _full(r, noise)
        x = LINEAR.state(xhat, noise, t_B)
    return Samples(x, (len(nodes) - 1) * field.nfe)


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
        uniform_times(steps)

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        return sample_ode(self.field, noise, uniform_times(steps), label_B, self.solver)


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
        uniform_times(steps)
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
        times = _rounded(nodes) if nodes else uniform_times(steps)
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
        uniform_times(steps)
        found = [each for each in self.fields if each.serves(steps)]
        if not found:
            allowed = ", ".join(each.says() for each in sorted(self.fields, key=lambda each: each.steps))
            raise ValueError(f"this student was trained for {allowed}, not for {steps} steps")
        return max(found, key=lambda each: each.steps)

    def check(self, steps: int) -> None:
        self.serving(steps)

    def __call__(self, steps: int, noise: Tensor, label_B: Condition | None, key: Key, index_B: Tensor) -> Samples:
        served, times = self.serving(steps), uniform_times(steps)
        rule = "euler" if served.steps else self.rule
        if rule == "fixed_noise":
            return sample_fixed_noise(served.field, noise, times, label_B)
        return sample_ode(served.field, noise, times, label_B, rule)


def _name(rule: str, window: Window) -> str:
    """Rows of guidance in two windows are two samplers'."""
    return rule if window == ALWAYS else f"{rule}, guided in [{window[0]:g}, {window[1]:g}]"


def _difference(r_B: Tensor, t_B: Tensor, x: Tensor) -> Tensor:
    return (r_B - t_B).reshape(-1, *([1] * (x.ndim - 1)))


def _full(t: float, x: Tensor) -> Tensor:
    """A time as ``[B]``, in float32 or better whatever the precision of ``x``."""
    return torch.full((len(x),), t, dtype=torch.promote_types(torch.float32, x.dtype), device=x.device)


@lru_cache(maxsize=64)
def uniform_times(steps: int) -> tuple[float, ...]:
    """The nodes of ``uniform_grid(steps)`` as the numbers that float32 makes of them."""
    return tuple(uniform_grid(steps).tolist())


@lru_cache(maxsize=64)
def _rounded(nodes: tuple[float, ...]) -> tuple[float, ...]:
    """To float32, which the times of a uniform grid have too."""
    return tuple(torch.tensor(nodes, dtype=torch.float32).tolist())


def _checked(times: Times) -> Sequence[float]:
    nodes = times.tolist() if isinstance(times, Tensor) else times
    flat = not isinstance(times, Tensor) or times.ndim == 1
    if not flat or len(nodes) < 2 or not all(r < t for t, r in pairwise(nodes)):
        raise ValueError(f"a time grid is 1-D and strictly decreasing with at least two nodes, got {nodes}")
    return nodes


def _jump(flow_map: FlowMap, jumps: Iterable[tuple[float, float]]) -> Callable[..., Tensor]:
    """The map, after all its jumps were found in its domain."""
    for t, r in jumps:
        flow_map.domain.check(t, r)
    return unchecked(flow_map)
