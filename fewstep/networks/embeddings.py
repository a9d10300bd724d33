"""Embeddings of times and of guidance."""

import math

import torch
from torch import Tensor, nn

from fewstep.networks.foreign.transformer import TimeEmbedder


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


class GuidanceEmbedding(nn.Module):
    """Guidance ``(w, low, high) [B, 3] -> [B, width]``: sinusoids of ``1 / w``, ``low`` and ``high`` and two linear
    layers, the last of which starts at exactly zero.

    All three numbers lie in [0, 1] where ``w >= 1``, so they change no faster than times do. In float32 as times are.
    """

    def __init__(self, width: int, *, max_frequency: float, features: int = 32) -> None:
        super().__init__()
        self.features = features
        self.max_frequency = max_frequency
        self.inner = nn.Linear(3 * features, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, guidance_B3: Tensor) -> Tensor:
        with torch.autocast(guidance_B3.device.type, enabled=False):
            w_B, low_B, high_B = guidance_B3.unbind(dim=1)
            features = [sinusoidal(number, self.features, self.max_frequency) for number in (1 / w_B, low_B, high_B)]
            hidden = self.inner(torch.cat(features, dim=-1).to(self.inner.weight.dtype))
            return self.outer(nn.functional.silu(hidden))


def to_bfloat16(net: nn.Module) -> nn.Module:
    """The network's weights in bfloat16, those of its embeddings of times and guidance excepted. Returns the same
    module."""
    net.to(torch.bfloat16)
    for module in net.modules():
        if isinstance(module, TimeEmbedding | GuidanceEmbedding | TimeEmbedder):
            module.float()
    return net
