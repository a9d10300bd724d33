"""Two-time networks as flow maps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.condition import Condition
from fewstep.flow import ANY_JUMP, JUMPS_TO_DATA, TimeDomain, check_jumps, expand

Network = Callable[..., Tensor]
"""``(x, t, r, label)`` or ``(x, t, r, label, guidance [B, 3])`` -> ``[B, *D]``: a two-time network, or one under the
guidance of some rows."""


@dataclass(frozen=True)
class GuidanceInput:
    """Guidance for a network that has it as an input: its scale (1 is off), and the times ``[low, high]`` in which it
    acts. ``ValueError`` unless ``scale > 0`` and ``0 <= low <= high <= 1``."""

    scale: float
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"a guidance scale is a positive number, got {self.scale:g}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"guidance acts between two times in [0, 1], the lower first: {self.low:g}, {self.high:g}")

    def batch(self, t_B: Tensor) -> Tensor:
        """``[B, 3]``, the same for every sample, in the precision of its times."""
        # Filled on the device: numbers from the host would be waited for, and no CUDA graph could hold them.
        return torch.stack([torch.full_like(t_B, number) for number in (self.scale, self.low, self.high)], dim=1)


@dataclass(frozen=True)
class AverageVelocityMap:
    """``x_r = x_t - (t - r) u(x_t, t, r)`` with ``u`` the network (Geng et al. 2505.13447, equation 12).

    ``domain`` is every jump for a MeanFlow student, one grid for a stage of progressive distillation. ``guidance`` is
    for networks that take it as an input.
    """

    net: Network
    domain: TimeDomain = ANY_JUMP
    nfe: int = 1
    guidance: GuidanceInput | None = None

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        check_jumps(self.domain, t_B, r_B)
        return self.jump(x, t_B, r_B, label_B)

    def jump(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """The same, of times that are known to be in the domain: nothing is read back from the device."""
        return x - expand(t_B - r_B, x) * _evaluate(self.net, x, t_B, r_B, label_B, _batch(self.guidance, t_B))


@dataclass(frozen=True)
class ConsistencyMap:
    """``f(x_t, t) = x_t - t F(x_t, t)``: jumps to data only, the boundary condition ``f(x, 0) = x`` built in.

    ``F`` has the meaning of the teacher's velocity, so that a student which copies the teacher starts as its data
    prediction. (The flow-native form of Song et al. 2303.01469, equation 5.) ``guidance`` is for networks that take it
    as an input.
    """

    net: Network
    domain: TimeDomain = JUMPS_TO_DATA
    nfe: int = 1
    guidance: GuidanceInput | None = None

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        check_jumps(self.domain, t_B, r_B)
        return self.jump(x, t_B, r_B, label_B)

    def jump(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """The same, of times that are known to be in the domain: nothing is read back from the device."""
        # t = r is the identity; elsewhere the domain has made sure that r = 0.
        return x - expand(t_B - r_B, x) * consistency_velocity(self.net, x, t_B, label_B, _batch(self.guidance, t_B))


def consistency_velocity(
    net: Network, x: Tensor, t_B: Tensor, label_B: Condition | None, guidance_B3: Tensor | None = None
) -> Tensor:
    """``F(x_t, t)``, the network at its second time ``r = 0``."""
    return _evaluate(net, x, t_B, torch.zeros_like(t_B), label_B, guidance_B3)


def _batch(guidance: GuidanceInput | None, t_B: Tensor) -> Tensor | None:
    return None if guidance is None else guidance.batch(t_B)


def _evaluate(
    net: Network, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None, guidance_B3: Tensor | None
) -> Tensor:
    """The network; without guidance, one that takes four arguments will do."""
    if guidance_B3 is None:
        return net(x, t_B, r_B, label_B)
    return net(x, t_B, r_B, label_B, guidance_B3)
