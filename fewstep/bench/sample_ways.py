"""Ways of sampling around one network: fewstep's samplers, and the loops one would write by hand beside them.

Shapes: B batch, D dimensions of a sample. A network is ``net(x [B, *D], t [B], r [B], label [B] or None) -> [B, *D]``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation.sweep import draw
from fewstep.keys import Key
from fewstep.sampling import MapSampler, OdeSampler, Sampler, uniform_times
from fewstep.students.maps import AverageVelocityMap, ConsistencyMap
from fewstep.teachers.guided import ClassContrast, GuidedField
from fewstep.teachers.network import NetworkField

Net = Callable[..., Tensor]
Sampling = Callable[[], Tensor]
"""One call draws samples ``[B, *D]``."""

GUIDANCE = 2.0
JUMPS, EULER = "jumps", "Euler"


@dataclass(frozen=True)
class Inputs:
    """What all ways start from: ``noise [B, *D]``, labels ``[B]`` or None among ``classes``, and the number of steps on
    the uniform grid."""

    noise: Tensor
    label: Tensor | None
    classes: int
    steps: int

    @property
    def index(self) -> Tensor:
        return torch.arange(len(self.noise), device=self.noise.device)

    @property
    def nodes(self) -> tuple[float, ...]:
        return uniform_times(self.steps)

    def generator(self) -> torch.Generator:
        """A fresh one on the device, for those who draw in sequence."""
        return torch.Generator(self.noise.device).manual_seed(0)


@dataclass(frozen=True)
class Way:
    """A way of sampling: ``build`` puts it around a network, of which one sampling makes ``calls`` calls, on a batch
    twice as large where ``doubled``.

    It has to draw the samples of the way named ``like``, within ``tolerance`` of their largest coordinate. ``gated``
    ways are those whose overhead a gate compares; ways that are not ``alone`` have a network of their own.
    """

    name: str
    of: str
    build: Callable[[Net], Sampling]
    calls: int
    like: str | None = None
    tolerance: float = 1e-5
    gated: bool = False
    doubled: bool = False
    alone: bool = True


def own_ways(inputs: Inputs) -> list[Way]:
    """Loops by hand, then fewstep's samplers."""
    steps = inputs.steps

    def by(sampler: Callable[[Net], Sampler]) -> Callable[[Net], Sampling]:
        return lambda net: functools.partial(sampled, sampler(net), inputs)

    way = functools.partial(Way, of="fewstep", calls=steps)
    ways = [
        Way("jumps by hand", "torch", lambda net: functools.partial(_jumps_by_hand, net, inputs), steps),
        Way("Euler by hand", "torch", lambda net: functools.partial(_euler_by_hand, net, inputs), steps),
        way(JUMPS, build=by(jump_sampler), like="jumps by hand", gated=True),
        way(EULER, build=by(_ode), like="Euler by hand", gated=True),
        way("renoise", build=by(_renoise)),
        way("renoise, torch.randn", build=lambda net: functools.partial(_renoised_in_sequence, net, inputs)),
        way("Heun", build=by(lambda net: OdeSampler(NetworkField(net), "heun")), calls=2 * steps),
        way("midpoint", build=by(lambda net: OdeSampler(NetworkField(net), "midpoint")), calls=2 * steps),
        way("jumps, with their noise", build=lambda net: functools.partial(_drawn, jump_sampler(net), inputs)),
    ]
    if inputs.label is not None:
        ways.append(way("Euler, guided", build=by(functools.partial(_guided, inputs.classes)), doubled=True))
    return ways


def bare_calls(net: Net, inputs: Inputs, calls: int, *, doubled: bool = False) -> Sampling:
    """Nothing but ``calls`` calls of the network, the times of ``inputs`` in turns and on the device already."""
    x, label = inputs.noise, inputs.label
    if doubled:
        x, label = torch.cat((x, x)), None if label is None else torch.cat((label, label))
    times = [torch.full((len(x),), t, device=x.device) for t in inputs.nodes]
    pairs = list(pairwise(times))

    @torch.no_grad()
    def work() -> Tensor:
        for call in range(calls):
            t_B, r_B = pairs[call % len(pairs)]
            out = net(x, t_B, r_B, label)
        return out

    return work


def returning_at_once(inputs: Inputs) -> Net:
    """A network that does nothing: what is left of a way around it is its own."""
    ready = {len(x): x for x in (inputs.noise, torch.cat((inputs.noise, inputs.noise)))}

    def net(x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None) -> Tensor:
        return ready[len(x)]

    return net


def jump_sampler(net: Net) -> MapSampler:
    return MapSampler({0: AverageVelocityMap(net)}, "jumps")


def _renoise(net: Net) -> MapSampler:
    return MapSampler({0: ConsistencyMap(net)}, "renoise")


def _ode(net: Net) -> Sampler:
    return OdeSampler(NetworkField(net))


def _guided(classes: int, net: Net) -> Sampler:
    """Conditional and unconditional velocity in one call on a doubled batch."""
    return OdeSampler(GuidedField(ClassContrast(NetworkField(net), classes), GUIDANCE))


def sampled(sampler: Sampler, inputs: Inputs) -> Tensor:
    """One call of a sampler."""
    return sampler(inputs.steps, inputs.noise, inputs.label, Key(0), inputs.index).x


def _drawn(sampler: Sampler, inputs: Inputs) -> Tensor:
    """As evaluation and ``fewstep sample`` draw: noise and labels of every batch are part of it."""
    data = Dataset("bench", torch.empty(0, *inputs.noise.shape[1:]), None, inputs.classes, kind="points")
    count = len(inputs.noise)
    return draw(sampler, inputs.steps, data, n=count, batch_size=count, seed=0, device=inputs.noise.device).x


def _renoised_in_sequence(net: Net, inputs: Inputs) -> Tensor:
    """Fresh noise from ``torch.randn``, which belongs to the order of the calls and not to a sample."""
    generator = inputs.generator()

    def source(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(index_B), *shape, generator=generator, device=index_B.device)

    return sampled(replace(_renoise(net), source=source), inputs)


@torch.no_grad()
def _jumps_by_hand(net: Net, inputs: Inputs) -> Tensor:
    x = inputs.noise
    for t, r in pairwise(inputs.nodes):
        t_B, r_B = x.new_full((len(x),), t), x.new_full((len(x),), r)
        x = x - (t - r) * net(x, t_B, r_B, inputs.label)
    return x


@torch.no_grad()
def _euler_by_hand(net: Net, inputs: Inputs) -> Tensor:
    x = inputs.noise
    for t, r in pairwise(inputs.nodes):
        t_B = x.new_full((len(x),), t)
        x = x - (t - r) * net(x, t_B, t_B, inputs.label)
    return x
