"""Two-time networks as flow maps."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.flow import ANY_JUMP, JUMPS_TO_DATA, TimeDomain, check_jumps, expand


@dataclass(frozen=True)
class AverageVelocityMap:
    """``x_r = x_t - (t - r) u(x_t, t, r)`` with ``u`` the network (Geng et al. 2505.13447, equation 12).

    ``domain`` is every jump for a MeanFlow student, one grid for a stage of progressive distillation.
    """

    net: nn.Module
    domain: TimeDomain = ANY_JUMP
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        check_jumps(self.domain, t_B, r_B)
        return x - expand(t_B - r_B, x) * self.net(x, t_B, r_B, label_B)


@dataclass(frozen=True)
class ConsistencyMap:
    """``f(x_t, t) = x_t - t F(x_t, t)``: jumps to data only, the boundary condition ``f(x, 0) = x`` built in.

    ``F`` has the meaning of the teacher's velocity, so that a student which copies the teacher starts as its data
    prediction. (The flow-native form of Song et al. 2303.01469, equation 5.)
    """

    net: nn.Module
    domain: TimeDomain = JUMPS_TO_DATA
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        check_jumps(self.domain, t_B, r_B)
        # t = r is the identity; elsewhere the domain has made sure that r = 0.
        return x - expand(t_B - r_B, x) * consistency_velocity(self.net, x, t_B, label_B)


def consistency_velocity(net: nn.Module, x: Tensor, t_B: Tensor, label_B: Tensor | None) -> Tensor:
    """``F(x_t, t)``, the network at its second time ``r = 0``."""
    return net(x, t_B, torch.zeros_like(t_B), label_B)
