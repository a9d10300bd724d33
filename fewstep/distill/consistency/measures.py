"""What a deviation between two ends of jumps costs: a distance, and what it is divided by.

Distances are weights ``(delta [B, *D], t [B], b [B]) -> [B]`` as those of the flow maps are, and those can be used
here: ``plain`` is the mean square, ``PseudoHuber`` the one of 2310.14189.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.consistency.steps import Hop

LARGEST_NOISE = 80.0
"""EDM's largest noise level, beyond which ``noise_level`` is linear in ``t``."""


def absolute(delta: Tensor, t_B: Tensor, b_B: Tensor) -> Tensor:
    """``||delta||_1 / D``."""
    return delta.flatten(1).abs().mean(dim=1)


@dataclass(frozen=True)
class CoordinateHuber:
    """``sqrt(delta_i^2 + c^2) - c``, the mean over coordinates: an outlier is a coordinate here, not a sample."""

    offset: float

    def __call__(self, delta: Tensor, t_B: Tensor, b_B: Tensor) -> Tensor:
        square = delta.flatten(1).square()
        return (square / ((square + self.offset**2).sqrt() + self.offset)).mean(dim=1)


Unit = Callable[[Hop], Tensor]
"""A step -> what the distance found on it is divided by, ``[B]``."""


def one(hop: Hop) -> Tensor:
    """Every step counts the same."""
    return torch.ones_like(hop.t)


def step_length(hop: Hop) -> Tensor:
    """``t - q``: the gradient keeps its size when the steps are refined."""
    return hop.t - hop.q


def noise_step(hop: Hop) -> Tensor:
    """``sigma_t - sigma_q`` (Song and Dhariwal 2310.14189, section 3.1)."""
    return noise_level(hop.t) - noise_level(hop.q)


@dataclass(frozen=True)
class OutputScale:
    """``c_out^2 = (sigma s)^2 / (sigma^2 + s^2)`` with ``s`` the data's standard deviation (EDM's, 2206.00364)."""

    data_std: float

    def __call__(self, hop: Hop) -> Tensor:
        variance, data = noise_level(hop.t).square(), self.data_std**2
        return variance * data / (variance + data)


def noise_level(t_B: Tensor) -> Tensor:
    """``sigma = t / (1 - t)``, up to 80; from there on linear in ``t``, so that ``t = 1`` has one too (81)."""
    return t_B / (1 - t_B).clamp(min=1 / (1 + LARGEST_NOISE))
