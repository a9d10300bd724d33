"""Guidance folded into training: one formula, whatever the paper.

A student that regresses ``a v_c + b u(c) + n u(null)`` with ``a + b + n = 1``, where ``u`` is its own diagonal, comes
to rest at the guided velocity ``v(null) + w (v(c) - v(null))`` with ``w = a / (1 - b)``. MeanFlow's ``omega`` and
``kappa`` are ``a`` and ``b``; improved MeanFlow takes ``a = 1``, SoFlow ``b = 1 - m``, Terminal Velocity Matching
``b = 0``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.keys import Key

NO_GUIDANCE = (1.0, 0.0, 1.0)
"""Scale one on the whole interval: what a student with guidance as an input is told where there is none."""


@dataclass(frozen=True)
class GuidanceRange:
    """How much guidance a row gets: a fixed scale and window, or, where the student is told them, drawn ones.

    ``scale`` acts at times in ``[low, high]``; elsewhere there is none. With ``largest`` the scale is drawn from
    ``[scale, largest]`` with a density in proportion to ``w^-power`` (Geng et al. 2512.02012, appendix: power 1 on
    [1, 8]), and with ``random_window`` ``low`` from (0, low) and ``high`` from (high, 1).
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    largest: float | None = None
    power: float = 1.0
    random_window: bool = False

    def draw(self, key: Key, index_B: Tensor) -> Tensor:
        """``[B, 3]`` float32: scale and window of each sample."""
        scale = torch.full((len(index_B),), self.scale, dtype=torch.float64, device=index_B.device)
        low, high = torch.full_like(scale, self.low), torch.full_like(scale, self.high)
        if self.largest is not None:
            scale = _power_law(key.uniform("guidance", index_B), self.scale, self.largest, self.power)
        if self.random_window:
            u_B2 = key.uniform("guidance_window", index_B, (2,))
            low, high = low * u_B2[:, 0], 1 - (1 - high) * u_B2[:, 1]
        return torch.stack((scale, low, high), dim=-1).float()


def _power_law(u: Tensor, low: float, high: float, power: float) -> Tensor:
    """The inverse of the distribution function of ``w^-power`` on ``[low, high]``."""
    if power == 1:
        return low * (high / low) ** u
    a = 1 - power
    return (low**a + u * (high**a - low**a)) ** (1 / a)


def scale_at(guidance_B3: Tensor, t_B: Tensor) -> Tensor:
    """The scale ``[B]`` that acts at ``t [B]``: one outside of the window."""
    scale, low, high = guidance_B3.unbind(-1)
    return torch.where((low <= t_B) & (t_B <= high), scale, torch.ones_like(scale))
