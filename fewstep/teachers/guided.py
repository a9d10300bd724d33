"""Guidance as a wrapper around any velocity field: away from the one without the class, or from a weaker one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.condition import Condition, joined, without
from fewstep.flow import VelocityField, expand

Contrast = Callable[[Tensor, Tensor, Condition | None], tuple[Tensor, Tensor]]
"""``(x, t, label) -> (good, bad)``: two velocities; guidance goes from the bad one through the good one and beyond."""


@dataclass(frozen=True)
class ClassContrast:
    """A conditional field with the condition against the same field without: classifier-free guidance (Ho and Salimans
    2207.12598). ``null_label`` stands for "no class", where a class is the condition. Both come from one call on a
    doubled batch, which still is two network evaluations per sample. Only the first ``channels`` are guided, if that is
    not None: beyond them both are the same (the samplers of DiT and SiT guide 3 of their 4 channels).
    """

    field: VelocityField
    null_label: int
    channels: int | None = None

    @property
    def nfe(self) -> int:
        return 2 * self.field.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
        if label_B is None:
            raise ValueError("guidance needs labels")
        both = joined(label_B, without(label_B, self.null_label))
        v_c, v_u = self.field(torch.cat((x, x)), torch.cat((t_B, t_B)), both).chunk(2)
        if self.channels is not None:
            v_u = torch.cat((v_u[:, : self.channels], v_c[:, self.channels :]), dim=1)
        return v_c, v_u


@dataclass(frozen=True)
class Unconditional:
    """A field that knows no conditions, in a place where there are some."""

    field: VelocityField

    @property
    def nfe(self) -> int:
        return self.field.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        return self.field(x, t_B, None)


@dataclass(frozen=True)
class WeakContrast:
    """A field against a weaker one of the same kind, with the same label: autoguidance (Karras et al. 2406.02507)."""

    field: VelocityField
    weak: VelocityField

    @property
    def nfe(self) -> int:
        return self.field.nfe + self.weak.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None) -> tuple[Tensor, Tensor]:
        return self.field(x, t_B, label_B), self.weak(x, t_B, label_B)


@dataclass(frozen=True)
class GuidedField:
    """``v_bad + w (v_good - v_bad)``, where ``w = 1`` is off, as it is at times outside of ``[low, high]``
    (Kynkäänniemi et al. 2404.07724)."""

    contrast: ClassContrast | WeakContrast
    w: float
    low: float = 0.0
    high: float = 1.0

    @property
    def nfe(self) -> int:
        return self.contrast.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        good, bad = self.contrast(x, t_B, label_B)
        beyond = bad + self.w * (good - bad)
        if (self.low, self.high) == (0, 1):
            return beyond
        return torch.where(expand((t_B >= self.low) & (t_B <= self.high), x), beyond, good)


def guided(
    field: VelocityField, w: float, null_label: int | None, low: float = 0.0, high: float = 1.0
) -> VelocityField:
    """``field`` itself at ``w = 1``, else under classifier-free guidance. ``ValueError`` if it knows no labels."""
    if w == 1:
        return field
    if null_label is None:
        raise ValueError(f"guidance {w:g} asked of a teacher without classes")
    return GuidedField(ClassContrast(field, null_label), w, low, high)
