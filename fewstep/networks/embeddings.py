"""Embeddings of one and of two times."""

import math

import torch
from torch import Tensor, nn


def sinusoidal(t_B: Tensor, dim: int, max_frequency: float) -> Tensor:
    """``[cos(w_k t), sin(w_k t)]`` for ``dim / 2`` angular frequencies spaced geometrically from 1 to
    ``max_frequency``.

    ``t`` is in [0, 1], unscaled: a factor of 1000 here would multiply every time derivative by 1000.
    """
    frequencies = torch.logspace(0, math.log10(max_frequency), dim // 2, dtype=t_B.dtype, device=t_B.device)
    angle = t_B[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """``t [B] -> [B, width]``: sinusoids and two linear layers. ``zero`` starts the last layer at exactly zero.

    In float32 whatever the precision around it: bfloat16 knows 256 different times between 1/2 and 1 at most.
    """

    def __init__(self, width: int, *, max_frequency: float, zero: bool, features: int = 32) -> None:
        super().__init__()
        self.features = features
        self.max_frequency = max_frequency
        self.inner = nn.Linear(features, width)
        self.outer = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        with torch.autocast(t_B.device.type, enabled=False):
            features = sinusoidal(t_B, self.features, self.max_frequency).to(self.inner.weight.dtype)
            return self.outer(nn.functional.silu(self.inner(features)))


def to_bfloat16(net: nn.Module) -> nn.Module:
    """The network's weights in bfloat16, those of its time embeddings excepted. Returns the same module."""
    net.to(torch.bfloat16)
    for module in net.modules():
        if isinstance(module, TimeEmbedding):
            module.float()
    return net
