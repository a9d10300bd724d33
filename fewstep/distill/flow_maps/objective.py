"""The one regression behind the family: MeanFlow and its relatives differ in what they give it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.condition import lose, lost
from fewstep.data.dataset import Batch
from fewstep.distill.couplings import Noise, gaussian_noise
from fewstep.distill.flow_maps.guidance import NO_GUIDANCE, GuidanceRange
from fewstep.distill.flow_maps.rows import Rows, bound
from fewstep.distill.flow_maps.rules import Goal, Rule, Setting
from fewstep.distill.flow_maps.velocity import Velocity, conditional
from fewstep.distill.flow_maps.weights import Weight, plain
from fewstep.distill.objective import LossOutput, TargetedObjective, mean_square, root_mean_square
from fewstep.distill.tangent import Derivative
from fewstep.flow import LINEAR, expand
from fewstep.keys import Key
from fewstep.networks.dropout import keyed_dropout
from fewstep.times import Pairs, jumps_last
from fewstep.uploads import numbers

Done = Callable[[int], float]
"""Optimiser step -> share of the training that is done."""


class FlowMapMatching(TargetedObjective):
    """Regress the average velocity ``u`` of jumps, and the velocity where nothing jumps::

        r = t:   Delta = u(x_t, t, t) - sg(v)
        r < t:   Delta = u(x_t, t, r) - sg(target),     the target by ``rule``
        L = E weight(Delta)

    ``velocity`` gives ``v``: from the data, from a teacher, guided or not. ``pairs`` draws the times and
    ``jump_fraction`` is the share of rows with ``r < t``. ``weight`` is a function or, where it learns, a module.
    ``target_decay`` averages the network that targets of the student's own come from (0: the student itself).
    ``label_dropout`` is the share of the rows with ``r = t`` that lose their label, and ``guidance`` what the student
    is told of guidance, where that is an input. ``done`` says how far the training is, for rules that change.

    The rows with ``r = t`` come first, so that derivatives and targets are computed on the others alone, without
    gradient; then one forward pass with gradient takes all rows. Only for a rule whose gradient passes the derivative
    the rows that jump have a pass of their own.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        rule: Rule,
        pairs: Pairs,
        jump_fraction: float,
        velocity: Velocity = conditional,
        weight: Weight = plain,
        derivative: Derivative | None = None,
        target_decay: float = 0.0,
        noise: Noise = gaussian_noise,
        guidance: GuidanceRange | None = None,
        label_dropout: float = 0.0,
        null_label: int = 0,
        done: Done = lambda step: 0.0,
    ) -> None:
        super().__init__(student, target_decay)
        self.rule = rule
        self.pairs = pairs
        self.jump_fraction = jump_fraction
        self.velocity = velocity
        self.weight = weight
        self.derivative = derivative
        self.noise = noise
        self.guidance = guidance
        self.label_dropout = label_dropout
        self.null_label = null_label
        self.done = done

    def forward(self, batch: Batch, key: Key) -> LossOutput:
        rows, diagonal = self.rows(batch, key)
        tail = rows[diagonal:]
        known = rows if self.rule.uses_velocity else rows[:diagonal]
        v = self.velocity(self.student, known)

        goal = self.goal(tail, v[diagonal:] if self.rule.uses_velocity else None, key)
        if goal.prediction is None:
            u = self.output(rows, key)
        else:
            u = torch.cat((self.output(rows[:diagonal], key), goal.prediction))
        if goal.finish is not None:
            goal = goal.finish(u[diagonal:].detach())

        delta = u - torch.cat((v[:diagonal], goal.target))
        if goal.share == 1:
            loss = self.weight(delta, rows.t, rows.r)
        else:
            share = torch.ones_like(rows.t)
            share[diagonal:] = goal.share
            delta = delta / expand(share, u)
            loss = share * self.weight(delta, rows.t, rows.r)
        return LossOutput(loss, *self.residuals(delta, rows, diagonal, goal))

    def rows(self, batch: Batch, key: Key) -> tuple[Rows, int]:
        """The batch in states and pairs of times, rows with ``r = t`` first, and how many those are."""
        order, diagonal = jumps_last(batch.index, self.jump_fraction, batch.first)
        index, x = batch.index[order], batch.x[order]
        jump = torch.arange(len(order), device=order.device) >= diagonal
        e = self.noise(batch, key)[order]
        pairs = self.pairs(key, index, jump)
        point = LINEAR.sample(x, e, pairs.t)

        label = None if batch.label is None else batch.label[order]
        if label is not None and self.label_dropout:
            drops = (key.uniform("label_dropout", index) < self.label_dropout) & ~jump
            label = lose(label, drops, self.null_label)
        told = None
        if self.guidance is not None:
            told = self.guidance.draw(key, index)
            if label is not None:  # without a class there is nothing to guide by
                none = numbers(NO_GUIDANCE, told.device)
                told = torch.where(lost(label, self.null_label)[:, None], none, told)
        return Rows(point.x_t, pairs.t, pairs.r, label, point.v, index, told), diagonal

    def goal(self, tail: Rows, v: Tensor | None, key: Key) -> Goal:
        """What the rule holds the rows that jump to. Every network sees the dropout masks of the output it is for."""
        setting = Setting(v, self.target_network, self.derivative, key, self.done(key.step))
        with keyed_dropout(self.student, key, tail.index), keyed_dropout(self.target_network, key, tail.index):
            return self.rule(self.student, tail, setting)

    def output(self, rows: Rows, key: Key) -> Tensor:
        """The student's ``u`` of some rows, with gradient."""
        with keyed_dropout(self.student, key, rows.index):
            return bound(self.student, rows)(rows.x, rows.t, rows.r, rows.label)

    @staticmethod
    def residuals(delta: Tensor, rows: Rows, diagonal: int, goal: Goal) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The plain residual, its time, and the diagnostics: on the diagonal alone, and the size of the derivative."""
        residual = mean_square(delta.detach())
        on_diagonal, jvp_norm = torch.full_like(residual, math.nan), torch.full_like(residual, math.nan)
        on_diagonal[:diagonal] = residual[:diagonal]
        if goal.tangent is not None:
            jvp_norm[diagonal:] = root_mean_square(goal.tangent)
        return residual, rows.t, {"diagonal_residual": on_diagonal, "jvp_norm": jvp_norm}
