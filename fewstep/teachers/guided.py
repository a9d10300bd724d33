"""Classifier-free guidance as a wrapper around any conditional velocity field."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.flow import VelocityField


@dataclass(frozen=True)
class GuidedField:
    """``v_u + w (v_c - v_u)`` (Ho and Salimans 2207.12598, in the form where ``w = 1`` is off).

    ``null_label`` is the label that stands for "no class". Both velocities come from one call on a doubled batch, which
    still is two network evaluations per sample.
    """

    field: VelocityField
    w: float
    null_label: int

    @property
    def nfe(self) -> int:
        return 2 * self.field.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        if label_B is None:
            raise ValueError("guidance needs labels")
        null_B = torch.full_like(label_B, self.null_label)
        both = self.field(torch.cat((x, x)), torch.cat((t_B, t_B)), torch.cat((label_B, null_B)))
        v_c, v_u = both.chunk(2)
        return v_u + self.w * (v_c - v_u)


def guided(field: VelocityField, w: float, null_label: int | None) -> VelocityField:
    """``field`` itself at ``w = 1``, else its guided wrapper. ``ValueError`` if the field knows no labels."""
    if w == 1:
        return field
    if null_label is None:
        raise ValueError(f"guidance {w:g} asked of a teacher without classes")
    return GuidedField(field, w, null_label)
