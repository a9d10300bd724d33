"""A trained network as a velocity field."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.condition import Condition


@dataclass(frozen=True)
class NetworkField:
    """``v(x, t) = net(x, t, r = t)``: a velocity network, or the diagonal of an average-velocity network.

    Not a module: an objective that holds a teacher must not train, prepare or save it.
    """

    net: Callable[..., Tensor]
    nfe: int = 1

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return self.net(x, t_B, t_B, label_B)
        # A teacher has the precision of its weights, whatever a student is trained in.
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x, t_B, t_B, label_B)


def freeze(net: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients. Returns the same module."""
    return net.eval().requires_grad_(False)
