"""A teacher trained by contrastive flow matching, freed of its bias."""

from dataclasses import dataclass

from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import VelocityField


@dataclass(frozen=True)
class CorrectedField:
    """``(1 - contrast) v - contrast E[x]`` of the biased field ``v``, ``mean = E[x]`` being ``[*D]``.

    The minimiser of ``||v - v_c||^2 - c ||v - v~||^2`` with ``v~`` of an independent sample is
    ``(E[v_c | x_t] - c E[v~]) / (1 - c)``, and ``E[v~] = -E[x]`` for a source of mean zero. Guidance commutes with it.
    """

    field: VelocityField
    contrast: float
    mean: Tensor

    @property
    def nfe(self) -> int:
        return self.field.nfe

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        return (1 - self.contrast) * self.field(x, t_B, label_B) - self.contrast * self.mean.to(x)
