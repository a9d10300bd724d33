"""Exponential moving averages of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """``shadow <- shadow + (1 - d_k) (weights - shadow)`` with ``d_k = min(decay, (1 + k) / (10 + k))`` at update
    ``k``.

    The ramp of ``d_k`` lets a young average forget the initial weights. Buffers are copied.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.updates = 0
        # Listed once: walking the module tree costs more than the update itself on small networks.
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([*self.net.parameters()], [*net.parameters()])
        self._buffers = list(zip(self.net.buffers(), net.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights of the network given at construction."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        shadow, weights = self._pairs
        torch._foreach_lerp_(shadow, weights, 1 - decay)
        for kept, value in self._buffers:
            kept.copy_(value)

    def state(self) -> dict[str, Tensor]:
        return self.net.state_dict()
