"""What training tells of itself: sums and counts, which processes and stretches of steps simply add up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.objective import LossOutput

TIME_BINS = 8
"""Equal parts of [0, 1] for which the residual is logged apart."""

Means = dict[str, float | list[float]]


@dataclass(frozen=True)
class Sums:
    """Named metrics ``M`` followed by the residual in ``TIME_BINS`` parts of time: ``value`` is ``[2, M + TIME_BINS]``
    float64, sums and counts."""

    names: tuple[str, ...]
    value: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        if self.names != other.names:
            raise ValueError(f"metrics {self.names} and {other.names} do not add up")
        return Sums(self.names, self.value + other.value)

    def means(self) -> Means:
        """Means by name, with ``residual_by_time`` a list; NaN where nothing was counted. Reads the device."""
        values = (self.value[0] / self.value[1]).tolist()
        return {**dict(zip(self.names, values, strict=False)), "residual_by_time": values[-TIME_BINS:]}


@torch.no_grad()
def sums_of(outputs: Sequence[LossOutput], grad_norms: Sequence[float]) -> Sums:
    """Over the samples of some batches: loss, residual, diagnostics where they apply; over some steps: the gradient's
    norm; and the residual by time.

    Made to be called once for many steps: on small networks it costs as much as the optimiser.
    """
    diagnostics = tuple(outputs[0].diagnostics)
    rows = torch.stack(
        [
            torch.cat([output.per_sample_B.detach().to(torch.float64) for output in outputs]),
            torch.cat([output.residual_B.to(torch.float64) for output in outputs]),
            *(torch.cat([output.diagnostics[name].to(torch.float64) for output in outputs]) for name in diagnostics),
        ]
    )
    applies = ~rows.isnan()
    applies[:2] = True  # a loss that is NaN is not left out
    norms = torch.tensor([[sum(grad_norms)], [len(grad_norms)]], dtype=torch.float64, device=rows.device)
    # A product instead of a scatter, whose order of summation is not fixed on GPUs.
    t = torch.cat([output.t_B for output in outputs])
    bins = torch.arange(TIME_BINS, device=t.device)
    inside = ((t * TIME_BINS).long().clamp(0, TIME_BINS - 1)[:, None] == bins).to(torch.float64)
    value = torch.stack(
        [
            torch.cat([rows.where(applies, 0.0).sum(dim=1), norms[0], rows[1] @ inside]),
            torch.cat([applies.to(torch.float64).sum(dim=1), norms[1], inside.sum(dim=0)]),
        ]
    )
    return Sums(("loss", "residual", *diagnostics, "grad_norm"), value)
