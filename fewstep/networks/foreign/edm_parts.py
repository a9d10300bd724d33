"""What the networks of EDM (Karras et al. 2206.00364) and of EDM2 (2312.02696) share: what surrounds them, what lies
where in them, and how they change resolution.

Shapes: B batch, C channels, H and W pixels, K taps of a filter.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.uploads import numbers

Resample = Literal["keep", "up", "down"]

VP_SLOPE, VP_MIN, VP_STEPS = 19.9, 0.1, 1000
"""Of the variance-preserving diffusion: the slope of the rate of its noise, that rate at first, its number of times."""


@dataclass(frozen=True)
class Scales:
    """``D(x; sigma) = skip x + out F(into x; noise)``: what surrounds a network ``F``, each ``[B]``."""

    skip_B: Tensor
    out_B: Tensor
    into_B: Tensor
    noise_B: Tensor


def scales(precond: Literal["edm", "vp", "ve"], sigma_B: Tensor, sigma_data: float) -> Scales:
    """Table 1 of 2206.00364."""
    one_B = torch.ones_like(sigma_B)
    if precond == "vp":
        rate_B = (VP_MIN**2 + 2 * VP_SLOPE * torch.log1p(sigma_B.square())).sqrt()
        noise_B = (VP_STEPS - 1) * (rate_B - VP_MIN) / VP_SLOPE
        return Scales(one_B, -sigma_B, (sigma_B.square() + 1).rsqrt(), noise_B)
    if precond == "ve":
        return Scales(one_B, sigma_B, one_B, (sigma_B / 2).log())
    total_B = sigma_B.square() + sigma_data**2
    return Scales(sigma_data**2 / total_B, sigma_data * sigma_B * total_B.rsqrt(), total_B.rsqrt(), sigma_B.log() / 4)


def denoise(net: nn.Module, x: Tensor, around: Scales, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
    """``D(x; sigma)``, ``[B, C, H, W]`` in the precision of ``x``, of ``net(x, noise_B, label, added_BE)``. What is
    around the network is in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    skip, out, into = (part[:, None, None, None].to(wide) for part in (around.skip_B, around.out_B, around.into_B))
    found = net(into * x.to(wide), around.noise_B, label, added_BE)
    return (skip * x.to(wide) + out * found.to(wide)).to(x.dtype)


def one_hot(label: Tensor | None, num_classes: int, like: Tensor) -> Tensor:
    """``[B, num_classes]`` for labels ``[B]`` of as many samples as ``like`` has: zeros for the label ``num_classes``,
    and without labels."""
    if label is None:
        return like.new_zeros(len(like), num_classes)
    return (label[:, None] == torch.arange(num_classes, device=label.device)).to(like.dtype)


def filter_of(taps: Sequence[float], device: torch.device | None = None) -> Tensor:
    """``[1, 1, K, K]``: the product of ``taps`` with themselves, of sum 1. Without a device: where modules are made."""
    row = torch.tensor(tuple(taps), dtype=torch.float32) if device is None else numbers(tuple(taps), device)
    return (torch.outer(row, row) / row.sum().square())[None, None]


def resampled(h_BCHW: Tensor, filter_11KK: Tensor, resample: Resample, padding: int | None = None) -> Tensor:
    """Half or twice the sides, every channel filtered. ``padding`` keeps to those sides unless said otherwise."""
    if resample == "keep":
        return h_BCHW
    channels, margin = h_BCHW.shape[1], (filter_11KK.shape[-1] - 1) // 2
    kernel = filter_11KK.to(h_BCHW.dtype).expand(channels, 1, -1, -1)
    if resample == "down":
        return F.conv2d(h_BCHW, kernel, groups=channels, stride=2, padding=margin if padding is None else padding)
    return F.conv_transpose2d(h_BCHW, 4 * kernel, groups=channels, stride=2, padding=margin)


@dataclass(frozen=True)
class Place:
    """A block of a U-Net: which way it is on, what it is called there, the side of what it puts out, its channels.
    ``last`` of its level and way."""

    way: Literal["enc", "dec"]
    name: str
    side: int
    enter: int
    leave: int
    resample: Resample = "keep"
    middle: bool = False
    block: bool = False
    last: bool = False


def places(sides: Sequence[int], widths: Sequence[int], blocks: int, first: int) -> Iterator[Place]:
    """Every block but the first convolution, of ``first`` channels: on the way down, in the middle, on the way up,
    where the blocks that carry a number see beside their input what the way down gave."""
    h, deepest = first, len(sides) - 1
    skips = [h]
    for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
        if level:
            yield Place("enc", named(side, "down"), side, h, h, "down")
            skips.append(h)
        for number in range(blocks):
            yield Place("enc", named(side, f"block{number}"), side, h, width, block=True, last=number == blocks - 1)
            h = width
            skips.append(h)
    for level, (side, width) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
        if level == deepest:
            yield Place("dec", named(side, "in0"), side, h, h, middle=True)
            yield Place("dec", named(side, "in1"), side, h, h)
        else:
            yield Place("dec", named(side, "up"), side, h, h, "up")
        for number in range(blocks + 1):
            enter = h + skips.pop()
            yield Place("dec", named(side, f"block{number}"), side, enter, width, block=True, last=number == blocks)
            h = width


def named(side: int, part: str) -> str:
    """Layers are named by the side of what they put out, and by their place there."""
    return f"{side}x{side}_{part}"


def level_sides(shape: tuple[int, ...], levels: int, kind: str) -> list[int]:
    """Pixels of a side at each level. ``UsageError`` for what is no square that can be halved so often."""
    factor = 2 ** (levels - 1)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % factor:
        raise UsageError(
            f"a network of kind {kind} with {levels} multipliers takes squares with sides that are multiples of "
            f"{factor}, not samples of shape {list(shape)}"
        )
    return [shape[1] >> level for level in range(levels)]


def glorot(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Weights by Glorot's rule, times ``gain``; no bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def silent(layer: nn.Module) -> nn.Module:
    """A layer that checkpoints have and sampling does not need: nothing trains it."""
    return layer.requires_grad_(False)


SQRT_HALF = math.sqrt(0.5)
