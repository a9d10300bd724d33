"""What a jump is held to: the exact characterisations of a flow map, as targets of a regression.

With ``f(x, t, r) = x - (t - r) u(x, t, r)`` the map is exact if and only if one of these holds for all pairs of times::

    Eulerian     u = v(x_t, t) - (t - r) du/dt                 the end stays where it is while the start flows
    Lagrangian   u - (t - r) d_r u = v(f, r)                   the end moves with the velocity found there
    semigroup    (t - r) u = (t - q) u(x_t, t, q) + (q - r) u(x_q, q, r)                     two jumps are one

A rule is called with the student's network and the rows that jump, and answers with a ``Goal``: what the student's
output is compared with. Times in a rule are ``[B]``; ``gap`` is ``t - r``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fewstep.distill.flow_maps.rows import Rows, bound
from fewstep.distill.flow_maps.schedules import Constant, Schedule
from fewstep.distill.flow_maps.velocity import Velocity, diagonal
from fewstep.distill.tangent import Derivative, EndDerivative, OneSidedDifference, PathDerivative
from fewstep.flow import expand
from fewstep.keys import Key


@dataclass(frozen=True)
class Goal:
    """``target [B, *D]``, a constant. ``prediction`` is what it is compared with where that is more than the student's
    output (None: the output itself). ``tangent`` is the derivative that was taken, for the diagnostics.

    ``share`` is the step of a discrete rule relative to the jump: deviations are divided by it, and their losses
    multiplied, so that deviations and gradients go over into those of the Eulerian rule. ``finish``, where it is given,
    makes the final goal from the student's output on these rows, without gradient.
    """

    target: Tensor
    prediction: Tensor | None = None
    tangent: Tensor | None = None
    share: float = 1.0
    finish: Callable[[Tensor], "Goal"] | None = None


@dataclass(frozen=True)
class Setting:
    """What a rule may draw on beside the rows: their velocities (if it uses them), the target network, the derivative
    along the path, the key of the step, and the share of the training that is done."""

    v: Tensor | None
    target_network: nn.Module
    derivative: Derivative | None
    key: Key
    done: float


class Rule(Protocol):
    """``uses_velocity`` says whether it wants the velocity at the rows themselves."""

    @property
    def uses_velocity(self) -> bool: ...

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal: ...


ALWAYS = Constant(1.0)


@dataclass(frozen=True)
class Eulerian:
    """``v - k (t - r) du/dt|_w`` (Geng et al. 2505.13447, equation 10), ``du/dt`` the derivative along ``(w, 1, 0)``.

    ``w`` is the velocity regressed on (MeanFlow), or the student's own marginal velocity ``u(x, t, t)`` (improved
    MeanFlow, 2512.02012, equation 10): then target and tangent do not share the noise of ``e - x``. ``k`` below one
    pulls to ``v`` (Align Your Flow, 2506.14603, section 3.2: up to .99).
    """

    tangent: Velocity | None = None
    factor: Schedule = ALWAYS
    uses_velocity: bool = field(default=True, init=False)

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal:
        assert setting.v is not None
        assert setting.derivative is not None
        v, derivative = setting.v, setting.derivative
        w = v if self.tangent is None else self.tangent(net, rows)
        gap = self.factor(setting.done) * expand(rows.t - rows.r, v)
        at = (rows.x, w, rows.t, rows.r, rows.label)

        def goal(du_dt: Tensor) -> Goal:
            return Goal(v - gap * du_dt, tangent=du_dt)

        if isinstance(derivative, OneSidedDifference):
            ahead = derivative.ahead(bound(net, rows), *at)
            return Goal(v, finish=lambda u: goal(derivative.between(u, ahead)))
        return goal(derivative(bound(net, rows), *at))


MEANFLOW = Eulerian()


@dataclass(frozen=True)
class Discrete:
    """``alpha v + (1 - alpha) u(x_t - (t - q) v, q, r)``, ``q = t - alpha (t - r)``: the Eulerian rule over a finite
    step (alpha-Flow, Zhang et al. 2510.20771; SoFlow, Luo et al. 2512.15657, with ``rho`` for ``alpha``).

    ``alpha = 1`` is flow matching with the jump as its label; the bias of ``alpha`` is of first order. At zero the
    ``limit`` takes over. ``clip`` bounds the target's coordinates (0: not at all).
    """

    alpha: Schedule
    clip: float = 0.0
    limit: Eulerian = MEANFLOW
    uses_velocity: bool = field(default=True, init=False)

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal:
        alpha = self.alpha(setting.done)
        if alpha == 0:
            return self.limit(net, rows, setting)
        assert setting.v is not None
        v, gap = setting.v, rows.t - rows.r
        q = rows.t - alpha * gap
        x_q = rows.x - expand(alpha * gap, v) * v
        with torch.no_grad():
            target = alpha * v + (1 - alpha) * bound(net, rows)(x_q, q, rows.r, rows.label)
        return Goal(clipped(target, self.clip), share=alpha)


@dataclass(frozen=True)
class Split:
    """``lambda u(x_t, t, q) + (1 - lambda) u(x_q, q, r)``, ``q = t - lambda (t - r)``, ``x_q = x_t - (t - q) u(x_t, t,
    q)``: two jumps of the target network in a row (SplitMeanFlow, Guo et al. 2507.16884, equation 9).

    ``at`` is where: ``random``, ``lambda`` uniform on (0, 1), or ``half`` (shortcut models, Frans et al. 2410.12557,
    equation 5). ``finest``: jumps of that length are held to two steps of the diagonal instead, the grid of halvings
    ends there. ``clip`` bounds states and targets (0: not at all).
    """

    at: Literal["random", "half"]
    clip: float = 0.0
    finest: float = 0.0
    uses_velocity: bool = field(default=False, init=False)

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal:
        t, r = rows.t, rows.r
        share = setting.key.uniform("split", rows.index).to(t) if self.at == "random" else torch.full_like(t, 0.5)
        q = t - share * (t - r)
        fine = t - r <= self.finest
        u = bound(setting.target_network, rows)
        with torch.no_grad():
            first = u(rows.x, t, torch.where(fine, t, q), rows.label)
            x_q = clipped(rows.x - expand(t - q, first) * first, self.clip)
            second = u(x_q, q, torch.where(fine, q, r), rows.label)
        weight = expand(share, first)
        return Goal(clipped(weight * first + (1 - weight) * second, self.clip))


@dataclass(frozen=True)
class Lagrangian:
    """``u - (t - r) d_r u`` against ``v(sg f(x, t, r), r)``, with the gradient through the derivative.

    ``velocity`` at the end of the jump: a teacher's (Align Your Flow's LMD, Sabour et al. 2506.14603, equation 5), or
    the diagonal of the target network (Terminal Velocity Matching, Zhou et al. 2511.19797, equation 9; with the student
    for its own target, the self-distillation of Boffi et al. 2505.18825).
    """

    derivative: EndDerivative
    velocity: Velocity = diagonal
    uses_velocity: bool = field(default=False, init=False)

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal:
        u, du_dr = self.derivative(bound(net, rows), rows.x, rows.t, rows.r, rows.label)
        gap = expand(rows.t - rows.r, u)
        end = (rows.x - gap * u).detach()
        target = self.velocity(setting.target_network, rows.at(end, rows.r))
        return Goal(target, prediction=u - gap * du_dr, tangent=du_dr.detach())


@dataclass(frozen=True)
class Modulated:
    """``u + (t - r) SG_k[du/dt]`` against ``v``, with ``SG_k[z] = k z + (1 - k) sg(z)``: MeanFlow's gradient at ``k =
    0``, the whole gradient of its identity at ``k = 1`` (Modular MeanFlow, You et al. 2508.17426, equation 12)."""

    derivative: PathDerivative
    factor: Schedule
    uses_velocity: bool = field(default=True, init=False)

    def __call__(self, net: nn.Module, rows: Rows, setting: Setting) -> Goal:
        assert setting.v is not None
        k = self.factor(setting.done)
        if k == 0:
            return MEANFLOW(net, rows, setting)
        u, du_dt = self.derivative(bound(net, rows), rows.x, setting.v, rows.t, rows.r, rows.label)
        modulated = k * du_dt + (1 - k) * du_dt.detach()
        prediction = u + expand(rows.t - rows.r, u) * modulated
        return Goal(setting.v, prediction=prediction, tangent=du_dt.detach())


def clipped(value: Tensor, bound: float) -> Tensor:
    """Coordinates within ``[-bound, bound]``; a bound of zero is none."""
    return value.clamp(-bound, bound) if bound else value
