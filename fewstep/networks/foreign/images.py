"""What the U-Nets of other projects share: their norm, and which images they take.

Shapes: B batch, C channels, H and W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError


class GroupNorm(nn.Module):
    """``torch.nn.GroupNorm`` under its names, for images ``[B, C, H, W]``.

    The weights are applied outside of torch's, whose compiled forward-mode derivative fails with them inside and takes
    contiguous input alone.
    """

    def __init__(self, groups: int, channels: int, *, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        normal = F.group_norm(h_BCHW.contiguous(), self.groups, eps=self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def check_image(kind: str, shape: tuple[int, ...], levels: int) -> None:
    """Samples that are no images, or whose sides ``levels`` resolutions do not halve, are a ``UsageError``."""
    if len(shape) != 3:
        raise UsageError(f"a network of kind {kind} takes images, not samples of shape {list(shape)}")
    halved = 2 ** (levels - 1)
    if shape[1] % halved or shape[2] % halved:
        raise UsageError(
            f"a network of kind {kind} with {levels} levels takes images with sides that are multiples of {halved}, "
            f"not {shape[1]} x {shape[2]}"
        )


def clock(tau_B: Tensor) -> Tensor:
    """Times as the projects embed them, in float32; float64 stays what it is."""
    return tau_B if tau_B.dtype == torch.float64 else tau_B.float()
