"""Where the velocity of a regression comes from: the data, a teacher, the student itself; each with guidance or not.

A velocity is a function ``(net, rows) -> v [B, *D]`` without gradient; ``net`` is the student's network, bare.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.condition import Condition, lost, without
from fewstep.distill.flow_maps.guidance import scale_at
from fewstep.distill.flow_maps.rows import Rows, bound, without_guidance
from fewstep.flow import VelocityField, expand
from fewstep.teachers.guided import Contrast
from fewstep.uploads import numbers

Velocity = Callable[[nn.Module, Rows], Tensor]


def conditional(net: nn.Module, rows: Rows) -> Tensor:
    """``e - x``. Its mean given the state is the marginal velocity, so the minimiser is the same; what it adds is
    noise."""
    return rows.v_c


def diagonal(net: nn.Module, rows: Rows) -> Tensor:
    """The student's own ``u(x, t, t)``, which is the marginal velocity once it has learned it."""
    with torch.no_grad():
        return bound(net, rows)(rows.x, rows.t, rows.t, rows.label)


@dataclass(frozen=True)
class TeacherVelocity:
    """A frozen field's velocity, its own guidance included."""

    field: VelocityField

    def __call__(self, net: nn.Module, rows: Rows) -> Tensor:
        with torch.no_grad():
            return self.field(rows.x, rows.t, rows.label)


@dataclass(frozen=True)
class ContrastedField:
    """``v_bad + w (v_good - v_bad)`` of a frozen pair of fields as a velocity field, with the guidance of each row."""

    contrast: Contrast
    guidance_B3: Tensor
    nfe: int = 2

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        with torch.no_grad():
            good, bad = self.contrast(x, t_B, label_B)
        w = expand(scale_at(self.guidance_B3, t_B), good).to(good)
        return bad + w * (good - bad)


@dataclass(frozen=True)
class ContrastedVelocity:
    """``v_bad + w (v_good - v_bad)`` of a frozen pair of fields (a class against none, or a teacher against a weaker
    one), with ``w`` of the rows where ``t`` is in their window, and ``fixed`` (scale, low, high) for rows that say
    nothing."""

    contrast: Contrast
    fixed: tuple[float, float, float]

    def __call__(self, net: nn.Module, rows: Rows) -> Tensor:
        return ContrastedField(self.contrast, guidance_of(rows, self.fixed))(rows.x, rows.t, rows.label)


@dataclass(frozen=True)
class SelfGuided:
    """``a v_c + b u(c) + (1 - a - b) u(null)`` with ``u`` the student's diagonal: guidance without a teacher.

    ``mix`` is ``b`` and ``a = w (1 - b)``; None takes ``b = 1 - 1/w``, hence ``a = 1``. Outside the window, and for
    rows that lost their label, it is ``v_c``. Without ``b`` one network evaluation less is made.
    """

    null_label: int
    fixed: tuple[float, float, float]
    mix: float | None = None

    def __call__(self, net: nn.Module, rows: Rows) -> Tensor:
        if rows.label is None:
            raise ValueError("guidance needs labels")
        w = scale_at(guidance_of(rows, self.fixed), rows.t)
        w = torch.where(lost(rows.label, self.null_label), torch.ones_like(w), w)
        b = 1 - 1 / w if self.mix is None else torch.where(w == 1, 0.0, self.mix)
        a = w * (1 - b)
        null = without(rows.label, self.null_label)
        with torch.no_grad():
            u_null = without_guidance(net, rows)(rows.x, rows.t, rows.t, null)
            v = expand(a, u_null) * rows.v_c + expand(1 - a - b, u_null) * u_null
            if self.mix != 0:
                v = v + expand(b, u_null) * bound(net, rows)(rows.x, rows.t, rows.t, rows.label)
        return v


def guidance_of(rows: Rows, fixed: tuple[float, float, float]) -> Tensor:
    """Scale and window of each row, ``[B, 3]``: its own, or the fixed ones."""
    if rows.guidance_B3 is not None:
        return rows.guidance_B3
    return numbers(fixed, rows.x.device).expand(len(rows), 3)
