"""A U-Net for images: DDPM++ (Song et al. 2011.13456) with the modulated blocks of ADM (Dhariwal and Nichol
2105.05233).

Shapes: B batch, C channels, H and W pixels, N pixels as tokens, K channels of a head, E width of the condition.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.networks.condition import ConditionedNetwork, Inputs
from fewstep.networks.config import UNetConfig
from fewstep.networks.dropout import Dropout


def normalise(h_BCHW: Tensor) -> Tensor:
    """Group norm without weights, in groups of four channels or more: those of torch's break compiled forward-mode AD.

    The forward derivative takes contiguous input alone, which convolutions of a ``channels_last`` image do not give.
    """
    return F.group_norm(h_BCHW.contiguous(), min(32, h_BCHW.shape[1] // 4))


class Norm(nn.Module):
    """Group norm with a weight and a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return normalise(h_BCHW) * self.weight + self.bias


class Block(nn.Module):
    """``skip(h) + W2 dropout(silu(modulate(norm(W1 silu(norm(h))))))``, shift and scale from the condition."""

    def __init__(self, enter: int, leave: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm = Norm(enter)
        self.inner = nn.Conv2d(enter, leave, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * leave)
        self.dropout = Dropout(dropout)
        self.outer = zeroed(nn.Conv2d(leave, leave, 3, padding=1))
        self.skip = nn.Identity() if enter == leave else nn.Conv2d(enter, leave, 1)

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_BE)[:, :, None, None].chunk(2, dim=1)
        inner = self.inner(F.silu(self.norm(h_BCHW)))
        modulated = normalise(inner) * (1 + scale) + shift
        return self.skip(h_BCHW) + self.outer(self.dropout(F.silu(modulated)))


class Attention(nn.Module):
    """``h + W softmax(q k / sqrt(K)) v`` among all pixels of an image.

    The kernel is torch's choice; the derivative along the path sets its own around the network.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.enter = nn.Linear(channels, 3 * channels)
        self.leave = zeroed(nn.Linear(channels, channels))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        tokens_BNC = self.norm(h_BCHW).flatten(2).transpose(1, 2)
        q, k, v = self.enter(tokens_BNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen_BNC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h_BCHW + self.leave(seen_BNC).transpose(1, 2).reshape(h_BCHW.shape)


class Down(nn.Module):
    """Half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return self.conv(h_BCHW)


class Up(nn.Module):
    """Twice the resolution: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(h_BCHW, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """A block, then attention if it has heads, then twice the resolution where a level ends on the way up."""

    def __init__(self, enter: int, leave: int, condition: int, dropout: float, *, heads: int, up: bool = False) -> None:
        super().__init__()
        self.block = Block(enter, leave, condition, dropout)
        self.attention = Attention(leave, heads) if heads else nn.Identity()
        self.up = Up(leave) if up else nn.Identity()

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        return self.up(self.attention(self.block(h_BCHW, condition_BE)))


class UNet(ConditionedNetwork):
    """``net(x, t, r, label, guidance) -> [B, C, H, W]`` under the conditions of ``ConditionedNetwork``; the output has
    the precision of ``x``. Its blocks are the stages, in the order in which they act: down, middle, up.

    A level of ``blocks`` stages per multiplier, each at half the resolution of the one before. On the way up every
    stage, one more per level, sees beside its input what the way down gave at its place, last out first in.
    """

    def __init__(self, shape: tuple[int, ...], config: UNetConfig, inputs: Inputs) -> None:
        sides = level_sides(shape, config)
        condition = 4 * config.channels
        stages = (2 * config.blocks + 1) * len(config.multipliers) + 2
        super().__init__(condition, stages, inputs, max_frequency=config.max_frequency)

        widths = [config.channels * multiplier for multiplier in config.multipliers]
        heads = [
            width // config.head_channels if side in config.attention else 0
            for width, side in zip(widths, sides, strict=True)
        ]
        h, deepest = widths[0], len(widths) - 1
        self.enter = nn.Conv2d(shape[0], h, 3, padding=1)
        # Flat lists of all levels: sharding gathers their elements one at a time.
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips = [h]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage(h, width, condition, config.dropout, heads=heads[level]))
                h = width
                skips.append(h)
            if level < deepest:
                self.down.append(Down(h))
                skips.append(h)
        self.middle.append(Stage(h, h, condition, config.dropout, heads=h // config.head_channels))
        self.middle.append(Stage(h, h, condition, config.dropout, heads=0))
        for level in range(deepest, -1, -1):
            width = widths[level]
            for number in range(config.blocks + 1):
                up = level > 0 and number == config.blocks
                enter = h + skips.pop()
                self.up.append(Stage(enter, width, condition, config.dropout, heads=heads[level], up=up))
                h = width
        self.norm = Norm(h)
        self.leave = zeroed(nn.Conv2d(h, shape[0], 3, padding=1))

    def forward(
        self,
        x: Tensor,
        t_B: Tensor,
        r_B: Tensor,
        label_B: Tensor | None = None,
        guidance_B3: Tensor | None = None,
    ) -> Tensor:
        h = self.enter(x.to(self.enter.weight.dtype))
        conditions = iter(self.conditions(t_B, r_B, label_B, guidance_B3, h.dtype))
        skips = [h]
        for stage in self.down:
            h = stage(h) if isinstance(stage, Down) else stage(h, next(conditions))
            skips.append(h)
        for stage in self.middle:
            h = stage(h, next(conditions))
        for stage in self.up:
            h = stage(torch.cat((h, skips.pop()), dim=1), next(conditions))
        return self.leave(F.silu(self.norm(h))).to(x.dtype)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer with weights that start at zero: what it ends starts as if it were not there."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def level_sides(shape: tuple[int, ...], config: UNetConfig) -> list[int]:
    """Pixels of the longer side at each level. Images the network cannot halve are a ``UsageError``."""
    if len(shape) != 3:
        raise UsageError(f"a network of kind unet takes images, not samples of shape {list(shape)}")
    _, height, width = shape
    levels = len(config.multipliers)
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise UsageError(
            f"a network of kind unet with {levels} multipliers takes images with sides that are multiples of "
            f"{2 ** (levels - 1)}, not {height} x {width}"
        )
    return [max(height, width) >> level for level in range(levels)]
