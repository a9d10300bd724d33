"""The one objective behind the discrete methods: two points of a trajectory, one end."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.condition import Condition
from fewstep.data.dataset import Batch
from fewstep.distill.consistency.measures import Unit, one
from fewstep.distill.consistency.steps import Draw, Hop
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.jumps import solve
from fewstep.distill.objective import LossOutput, TargetedObjective, mean_square
from fewstep.flow import LINEAR, VelocityField, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.sampling import Solver


@dataclass(frozen=True)
class Pairs:
    """Samples ``x`` and their noise ``e``, both ``[B, *D]``, with labels."""

    x: Tensor
    e: Tensor
    label: Condition | None


Nearer = Callable[[Pairs, Tensor, Hop], Tensor]
"""``(pairs, x_t, hop) -> x_q``: the state nearer to data, without gradient."""


def along_data(pairs: Pairs, x_t: Tensor, hop: Hop) -> Tensor:
    """The same pair at ``q``: a step of Euler's with the conditional velocity ``e - x`` (consistency training)."""
    return LINEAR.sample(pairs.x, pairs.e, hop.q).x_t


@dataclass(frozen=True)
class AlongTeacher:
    """One solver step of a frozen field (consistency distillation)."""

    field: VelocityField
    solver: Solver

    def __call__(self, pairs: Pairs, x_t: Tensor, hop: Hop) -> Tensor:
        return solve(self.field, self.solver, x_t, hop.t, hop.q, pairs.label)


@dataclass(frozen=True)
class Frozen:
    """A network that answers for targets at times below ``below``, instead of the student."""

    net: nn.Module
    below: float


class ConsistencyMatching(TargetedObjective):
    """Make both ends of a step towards data agree on where the segment ends::

        f(x, t; b) = x - (t - b) F(x, t, b)
        L = E factor d( f(x_t, t; b), sg f'(x_q, q; b) ) / unit
          + velocity_weight E || F(x_t, t, b) - sg F'(x_q, q, b) ||^2 / D

    ``steps`` draws ``t >= q >= b`` and the factor, ``nearer`` gives ``x_q``, ``distance`` is ``d`` and ``unit`` what it
    is divided by. Where ``q = b`` the target is ``x_b`` itself, which the teacher or the data know, and velocities are
    not compared. ``f'`` is an exponential moving average of the student with decay ``target_decay`` (0: the student
    itself), or ``decay_at(step)`` where it is to change; ``frozen`` answers in its place below a time.

    ``b = 0`` is the consistency model of Song et al. (2303.01469, algorithms 2 and 3), whose network
    has no second time; segments are those of phased consistency (2405.18407) and Consistency-FM (2407.02398).
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        steps: Draw,
        nearer: Nearer = along_data,
        distance: Weight = plain,
        unit: Unit = one,
        target_decay: float = 0.0,
        decay_at: Callable[[int], float] | None = None,
        velocity_weight: float = 0.0,
        frozen: Frozen | None = None,
        noise: Noise = gaussian_noise,
    ) -> None:
        super().__init__(student, target_decay)
        self.steps = steps
        self.nearer = nearer
        self.distance = distance
        self.unit = unit
        self.decay_at = decay_at
        self.velocity_weight = velocity_weight
        self.frozen = frozen  # in a dataclass, so that its network is no submodule
        self.noise = noise

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        if self.decay_at is not None:
            self.target_decay = self.decay_at(key.step)
        pairs = Pairs(batch.x, self.noise(batch, key), batch.label)
        hop = self.steps(key, batch.index).like(batch.x)
        t, q, b = hop.t, hop.q, hop.b

        x_t = LINEAR.sample(pairs.x, pairs.e, t).x_t
        x_q = self.nearer(pairs, x_t, hop)
        there = self.target_velocity(x_q, hop, batch, key)
        target = x_q - expand(q - b, x_q) * there
        with keyed_dropout(self.student, key, batch.index):
            here = self.student(x_t, t, b, batch.label)
        delta = x_t - expand(t - b, x_t) * here - target

        loss = self.distance(delta, t, b) / self.unit(hop)
        if hop.factor is not None:
            loss = hop.factor * loss
        if self.velocity_weight:
            compared = (q > b).to(t)
            loss = loss + self.velocity_weight * compared * mean_square((here - there).to(x_t))
        return LossOutput(loss, mean_square(delta.detach()), t, {})

    @torch.no_grad()
    def target_velocity(self, x_q: Tensor, hop: Hop, batch: Batch, key: Key) -> Tensor:
        """``F'(x_q, q, b)`` under the dropout masks of the output it is for."""
        with keyed_dropout(self.target_network, key, batch.index):
            found = self.target_network(x_q, hop.q, hop.b, batch.label)
        if self.frozen is None:
            return found
        old = self.frozen.net(x_q, hop.q, hop.b, batch.label)
        return torch.where(expand(hop.q < self.frozen.below, x_q), old, found)
