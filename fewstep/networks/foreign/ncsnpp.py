"""The U-Net of score_sde (NCSN++ and DDPM++, Song et al. 2011.13456) under its names, as RectifiedFlow uses it.

Shapes: B batch, C channels, H and W pixels, N pixels as tokens, E width of the embedding of time.
"""

import math
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.foreign.config import NCSNPPConfig
from fewstep.networks.foreign.images import GroupNorm, check_image, clock
from fewstep.uploads import numbers

FIR = (1.0, 3.0, 3.0, 1.0)
"""The filter of every config of the project, in each direction."""
NOISE_LEVELS = (50.0, 0.01)
"""First and last of the buffer ``sigmas``, a leftover of score matching: nothing reads it."""


def norm(channels: int) -> GroupNorm:
    return GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


SMALL = 1e-10
"""The scale of layers that end a branch: as good as zero."""

L = TypeVar("L", nn.Conv2d, nn.Linear)


def scaled_(weight: Tensor, scale: float) -> Tensor:
    """Fill a matrix, or a kernel ``[out, in, ...]``, evenly within a bound: variance ``scale`` over its mean fan."""
    fan = weight[0, 0].numel() * (weight.shape[0] + weight.shape[1]) / 2
    bound = math.sqrt(3 * scale / fan)
    return nn.init.uniform_(weight, -bound, bound)


def started(layer: L, scale: float) -> L:
    """The layer as the project starts it."""
    scaled_(layer.weight, scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv(enter: int, leave: int, kernel: int, *, scale: float = 1.0) -> nn.Conv2d:
    return started(nn.Conv2d(enter, leave, kernel, padding=kernel // 2), scale)


def dense(enter: int, leave: int) -> nn.Linear:
    return started(nn.Linear(enter, leave), 1.0)


def sinusoids(tau_B: Tensor, dim: int) -> Tensor:
    """``[B, dim]``: sines, then cosines, of ``tau`` at frequencies from 1 to 1 / 10000."""
    tau_B = clock(tau_B)
    step = math.log(10000) / (dim // 2 - 1)
    k = torch.arange(dim // 2, dtype=tau_B.dtype, device=tau_B.device)
    angle = tau_B[:, None] * torch.exp(k * -step)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class GaussianFourierProjection(nn.Module):
    """``[B] -> [B, 2 * features]``: sines, then cosines, of ``log tau`` at frequencies drawn once and never trained."""

    def __init__(self, features: int, scale: float = 16.0) -> None:
        super().__init__()
        self.W = nn.Parameter(scale * torch.randn(features), requires_grad=False)

    def forward(self, tau_B: Tensor) -> Tensor:
        tau_B = clock(tau_B)
        angle = tau_B.log()[:, None] * self.W.to(tau_B.dtype) * 2 * math.pi
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


def filtered(h_BCHW: Tensor, kernel: Tensor, *, up: bool) -> Tensor:
    """Twice or half the resolution, every channel filtered by ``kernel [4, 4]`` (the FIR resampling of 1912.04958)."""
    batch, channels, height, width = h_BCHW.shape
    planes = h_BCHW.reshape(batch * channels, 1, height, width)
    if up:
        planes = F.conv_transpose2d(planes, 4 * kernel[None, None], stride=2, padding=1)
    else:
        planes = F.conv2d(planes, kernel[None, None], stride=2, padding=1)
    return planes.reshape(batch, channels, *planes.shape[2:])


class Resample(nn.Module):
    """Twice or half the resolution: pixels repeated or averaged, or filtered. Without weights."""

    def __init__(self, *, up: bool, fir: bool) -> None:
        super().__init__()
        self.up = up
        self.fir = fir

    def forward(self, h_BCHW: Tensor) -> Tensor:
        if self.fir:
            taps = numbers(FIR, h_BCHW.device, h_BCHW.dtype) / sum(FIR)
            return filtered(h_BCHW, taps[:, None] * taps, up=self.up)
        return F.interpolate(h_BCHW, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(h_BCHW, 2)


class NIN(nn.Module):
    """A linear layer over the channels of tokens ``[B, N, C]``, its matrix the other way round."""

    def __init__(self, enter: int, leave: int, *, scale: float = 0.1) -> None:
        super().__init__()
        self.W = nn.Parameter(scaled_(torch.empty(enter, leave), scale))
        self.b = nn.Parameter(torch.zeros(leave))

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        return tokens_BNC @ self.W + self.b


class ResnetBlock(nn.Module):
    """``skip(h) + W1 silu(norm(W0 silu(norm(h)) + emb))``, over the root of two if ``rescale``.

    ``resample`` changes the resolution of the branch, before its first convolution, and of what it is added to.
    """

    def __init__(self, enter: int, leave: int, condition: int, *, rescale: bool, resample: Resample | None) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(enter)
        self.resample = resample or nn.Identity()
        self.Conv_0 = conv(enter, leave, 3)
        self.Dense_0 = dense(condition, leave)
        self.GroupNorm_1 = norm(leave)
        self.Conv_1 = conv(leave, leave, 3, scale=SMALL)
        self.Conv_2 = nn.Identity() if enter == leave and resample is None else conv(enter, leave, 1)
        self.root = math.sqrt(2) if rescale else 1.0

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        inner = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(h_BCHW))))
        inner = inner + self.Dense_0(F.silu(condition_BE))[:, :, None, None]
        branch = self.Conv_1(F.silu(self.GroupNorm_1(inner)))
        return (self.Conv_2(self.resample(h_BCHW)) + branch) / self.root


class AttnBlock(nn.Module):
    """``h + W softmax(q k / sqrt(C)) v`` among all pixels of an image, over the root of two if ``rescale``."""

    def __init__(self, channels: int, *, rescale: bool) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.NIN_0 = NIN(channels, channels)
        self.NIN_1 = NIN(channels, channels)
        self.NIN_2 = NIN(channels, channels)
        self.NIN_3 = NIN(channels, channels, scale=SMALL)
        self.root = math.sqrt(2) if rescale else 1.0

    def forward(self, h_BCHW: Tensor) -> Tensor:
        tokens_BNC = self.GroupNorm_0(h_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (project(tokens_BNC)[:, None] for project in (self.NIN_0, self.NIN_1, self.NIN_2))
        seen_BNC = self.NIN_3(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return (h_BCHW + seen_BNC.transpose(1, 2).reshape(h_BCHW.shape)) / self.root


class Combine(nn.Module):
    """``h + W x``: the image itself, at this resolution, beside what the network has made of it."""

    def __init__(self, enter: int, leave: int) -> None:
        super().__init__()
        self.Conv_0 = conv(enter, leave, 1)

    def forward(self, x_BCHW: Tensor, h_BCHW: Tensor) -> Tensor:
        return self.Conv_0(x_BCHW) + h_BCHW


class NCSNPP(nn.Module):
    """``net(x, tau, label, added) -> [B, C, H, W]`` in the precision of ``x``: what RectifiedFlow calls its model's
    output. It knows no classes and ignores labels.

    ``tau [B]`` is the time as that project gives it, 999 times one that runs from 0 to 1; with Fourier features never
    0, of which it takes the logarithm. ``added [B, E]`` is added to the embedding of time.
    """

    def __init__(self, shape: tuple[int, ...], config: NCSNPPConfig, num_classes: int) -> None:
        super().__init__()
        check_image(config.kind, shape, len(config.ch_mult))
        channels, nf, deepest = shape[0], config.nf, len(config.ch_mult) - 1
        self.config = config
        self.condition = 4 * nf
        first, last = (math.log(level) for level in NOISE_LEVELS)
        self.register_buffer("sigmas", torch.linspace(first, last, config.num_scales, dtype=torch.float64).exp())

        def block(enter: int, leave: int, *, to: str | None = None) -> ResnetBlock:
            resample = None if to is None else Resample(up=to == "up", fir=config.fir)
            return ResnetBlock(enter, leave, self.condition, rescale=config.skip_rescale, resample=resample)

        def attention(width: int) -> AttnBlock:
            return AttnBlock(width, rescale=config.skip_rescale)

        widths = [mult * nf for mult in config.ch_mult]
        modules: list[nn.Module] = []
        if config.embedding_type == "fourier":
            modules.append(GaussianFourierProjection(nf))
        modules.append(dense(2 * nf if config.embedding_type == "fourier" else nf, self.condition))
        modules.append(dense(self.condition, self.condition))

        h = nf
        modules.append(conv(channels, h, 3))
        skips = [h]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                modules.append(block(h, width))
                h = width
                if level in config.attention_levels:
                    modules.append(attention(h))
                skips.append(h)
            if level < deepest:
                modules.append(block(h, h, to="down"))
                if config.progressive_input == "input_skip":
                    modules.append(Combine(channels, h))
                skips.append(h)
        modules += [block(h, h), attention(h), block(h, h)]
        for level in range(deepest, -1, -1):
            for _ in range(config.num_res_blocks + 1):
                modules.append(block(h + skips.pop(), widths[level]))
                h = widths[level]
            if level in config.attention_levels:
                modules.append(attention(h))
            if config.progressive == "output_skip" or level == 0:
                modules += [norm(h), conv(h, channels, 3, scale=SMALL)]
            if level > 0:
                modules.append(block(h, h, to="up"))
        self.all_modules = nn.ModuleList(modules)
        self.shrink = Resample(up=False, fir=config.fir)
        self.grow = Resample(up=True, fir=config.fir)

    def forward(
        self, x: Tensor, tau_B: Tensor, label_B: Tensor | None = None, added_BE: Tensor | None = None
    ) -> Tensor:
        config, deepest = self.config, len(self.config.ch_mult) - 1
        modules = iter(self.all_modules)
        condition_BE = self.conditions(tau_B, added_BE, modules)
        enter = cast(nn.Conv2d, next(modules))
        state = x.to(enter.weight.dtype)
        condition_BE = condition_BE.to(state.dtype)
        if not config.centered:
            state = 2 * state - 1

        h, image = enter(state), state
        skips = [h]
        for level in range(deepest + 1):
            for _ in range(config.num_res_blocks):
                h = next(modules)(h, condition_BE)
                if level in config.attention_levels:
                    h = next(modules)(h)
                skips.append(h)
            if level < deepest:
                h = next(modules)(h, condition_BE)
                if config.progressive_input == "input_skip":
                    image = self.shrink(image)
                    h = next(modules)(image, h)
                skips.append(h)
        h = next(modules)(h, condition_BE)
        h = next(modules)(h)
        h = next(modules)(h, condition_BE)

        out: Tensor | None = None
        for level in range(deepest, -1, -1):
            for _ in range(config.num_res_blocks + 1):
                h = next(modules)(torch.cat((h, skips.pop()), dim=1), condition_BE)
            if level in config.attention_levels:
                h = next(modules)(h)
            if config.progressive == "output_skip" or level == 0:
                here = F.silu(next(modules)(h))
                here = next(modules)(here)
                out = here if out is None else self.grow(out) + here
            if level > 0:
                h = next(modules)(h, condition_BE)
        assert out is not None
        if config.scale_by_sigma:
            out = out / tau_B[:, None, None, None]
        return out.to(x.dtype)

    def conditions(self, tau_B: Tensor, added_BE: Tensor | None, modules: Iterator[nn.Module]) -> Tensor:
        """The embedding of time and of what is added to it, ``[B, E]``, from the first of the modules."""
        with torch.autocast(tau_B.device.type, enabled=False):
            if self.config.embedding_type == "fourier":
                features = next(modules)(tau_B)
            else:
                features = sinusoids(tau_B, self.config.nf)
            inner = cast(nn.Linear, next(modules))
            condition_BE = next(modules)(F.silu(inner(features.to(inner.weight.dtype))))
        return condition_BE if added_BE is None else condition_BE + added_BE
