"""The networks of EDM (Karras et al. 2206.00364): DDPM++, NCSN++ (Song et al. 2011.13456) and ADM (Dhariwal and Nichol
2105.05233), each inside a preconditioner.

Shapes: B batch, C channels, H and W pixels, E width of the condition, A heads, N pixels as tokens, K channels a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.foreign.config import EDMConfig
from fewstep.networks.foreign.edm_parts import (
    SQRT_HALF,
    Resample,
    denoise,
    filter_of,
    glorot,
    level_sides,
    named,
    one_hot,
    places,
    resampled,
    scales,
    silent,
)

MAX_PERIOD = 10000.0
"""Of the sinusoids of time."""


@dataclass(frozen=True)
class Style:
    """What sets the blocks of the architectures apart. One head, or one for every 64 channels. Sums are times
    ``scale``. The condition shifts and scales what is normalised (``modulated``), or else is added before."""

    one_head: bool
    scale: float
    modulated: bool
    eps: float
    taps: tuple[float, ...]


STYLES = {
    "ddpmpp": Style(one_head=True, scale=SQRT_HALF, modulated=False, eps=1e-6, taps=(1, 1)),
    "ncsnpp": Style(one_head=True, scale=SQRT_HALF, modulated=False, eps=1e-6, taps=(1, 3, 3, 1)),
    "adm": Style(one_head=False, scale=1.0, modulated=True, eps=1e-5, taps=(1, 1)),
}


class Norm(nn.Module):
    """Group norm in groups of four channels or more, 32 at most."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = min(32, channels // 4), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        # Contiguous, and without torch's own weights: forward derivatives want the one, compiled ones the other.
        normal = F.group_norm(h_BCHW.contiguous(), self.groups, eps=self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class Conv(nn.Conv2d):
    """A convolution that keeps the sides of what it sees, which was resampled before. ``late``: it is resampled
    after, the two with the margins of one."""

    resample_filter: Tensor | None

    def __init__(
        self,
        enter: int,
        leave: int,
        kernel: int,
        resample: Resample = "keep",
        taps: Sequence[float] = (1, 1),
        *,
        late: bool = False,
    ) -> None:
        super().__init__(enter, leave, kernel, padding=kernel // 2)
        self.resample: Resample = resample
        self.late = late
        self.register_buffer("resample_filter", None if resample == "keep" else filter_of(taps))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        if self.resample_filter is None:
            return super().forward(h_BCHW)
        if not self.late:
            return super().forward(resampled(h_BCHW, self.resample_filter, self.resample))
        margin = self.weight.shape[-1] // 2 + (self.resample_filter.shape[-1] - 1) // 2
        wide = F.conv2d(h_BCHW, self.weight, padding=margin)
        assert self.bias is not None
        return resampled(wide, self.resample_filter, self.resample, padding=0) + self.bias[:, None, None]


class Shift(nn.Module):
    """Half or twice the sides, and no more."""

    resample_filter: Tensor

    def __init__(self, resample: Resample, taps: Sequence[float]) -> None:
        super().__init__()
        self.resample: Resample = resample
        self.register_buffer("resample_filter", filter_of(taps))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return resampled(h_BCHW, self.resample_filter, self.resample)


class Block(nn.Module):
    """Two convolutions beside a shortcut, resampled if said so, then attention among all pixels if it has heads."""

    def __init__(
        self,
        enter: int,
        leave: int,
        condition: int,
        style: Style,
        *,
        resample: Resample = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.enter, self.style = enter, style
        self.heads = (1 if style.one_head else leave // 64) if attention else 0
        self.norm0 = Norm(enter, style.eps)
        self.conv0 = Conv(enter, leave, 3, resample, style.taps)
        self.affine = nn.Linear(condition, leave * (2 if style.modulated else 1))
        self.norm1 = Norm(leave, style.eps)
        self.conv1 = Conv(leave, leave, 3)
        self.skip: nn.Module | None = None
        if enter != leave or (resample != "keep" and not style.modulated):
            self.skip = Conv(enter, leave, 1, resample, style.taps)
        elif resample != "keep":
            self.skip = Shift(resample, style.taps)
        if self.heads:
            self.norm2 = Norm(leave, style.eps)
            self.qkv = Conv(leave, 3 * leave, 1)
            self.proj = Conv(leave, leave, 1)
        self._initialise()

    def _initialise(self) -> None:
        """What ends a branch starts at zero (ADM), or almost (the others, all by Glorot's rule)."""
        ends = [self.conv1, self.proj] if self.heads else [self.conv1]
        if self.style.modulated:
            for end in ends:
                glorot(end, 0.0)
            return
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                glorot(layer, 1e-5 if layer in ends else 1.0)
        if self.heads:
            glorot(self.qkv, math.sqrt(0.2))

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        inner = self.conv0(F.silu(self.norm0(h_BCHW)))
        told = self.affine(condition_BE)[:, :, None, None].to(inner.dtype)
        if self.style.modulated:
            scale, shift = told.chunk(2, dim=1)
            inner = F.silu(self.norm1(inner) * (1 + scale) + shift)
        else:
            inner = F.silu(self.norm1(inner + told))
        past = h_BCHW if self.skip is None else self.skip(h_BCHW)
        h_BCHW = (self.conv1(inner) + past) * self.style.scale
        if not self.heads:
            return h_BCHW
        # Channels are heads, then those of a head, then query, key and value.
        parts = self.qkv(self.norm2(h_BCHW)).flatten(2).unflatten(1, (self.heads, -1, 3))
        q_BANK, k_BANK, v_BANK = parts.transpose(2, 4).unbind(3)
        seen_BANK = F.scaled_dot_product_attention(q_BANK, k_BANK, v_BANK)
        seen = seen_BANK.transpose(2, 3).reshape(h_BCHW.shape)
        return (self.proj(seen) + h_BCHW) * self.style.scale


class Sinusoids(nn.Module):
    """``[B] -> [B, width]``: cosines, then sines, of frequencies spaced geometrically from 1 towards ``1 /
    MAX_PERIOD``, which the last one is if ``ends``."""

    def __init__(self, width: int, *, ends: bool) -> None:
        super().__init__()
        self.count, self.steps = width // 2, max(1, width // 2 - ends)

    def forward(self, noise_B: Tensor) -> Tensor:
        place = torch.arange(self.count, dtype=noise_B.dtype, device=noise_B.device) / self.steps
        angle = noise_B[:, None] * torch.pow(1 / MAX_PERIOD, place)
        return torch.cat((angle.cos(), angle.sin()), dim=1)


class FourierFeatures(nn.Module):
    """``[B] -> [B, width]``: cosines, then sines, of frequencies drawn once."""

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))

    def forward(self, noise_B: Tensor) -> Tensor:
        angle = noise_B[:, None] * (2 * math.pi * self.freqs).to(noise_B.dtype)
        return torch.cat((angle.cos(), angle.sin()), dim=1)


class SongUNet(nn.Module):
    """DDPM++, and NCSN++, which has Fourier features of time and sees its input at every level of the way down.

    ``net(x, noise, label, added) -> [B, C, H, W]``, without a preconditioner, in the precision of its weights.
    """

    def __init__(self, shape: tuple[int, ...], config: EDMConfig, num_classes: int) -> None:
        super().__init__()
        style, sides = STYLES[config.arch], level_sides(shape, len(config.multipliers), config.kind)
        widths = [config.channels * times for times in config.multipliers]
        fourier, condition = config.arch == "ncsnpp", config.embedding * config.channels
        features = 2 * config.channels if fourier else config.channels
        self.num_classes = num_classes
        self.map_noise = FourierFeatures(features) if fourier else Sinusoids(features, ends=True)
        self.map_label = nn.Linear(num_classes, features) if num_classes else None
        augment = config.augment_dim
        self.map_augment = silent(nn.Linear(augment, features, bias=False)) if augment else None
        self.map_layer0 = nn.Linear(features, condition)
        self.map_layer1 = nn.Linear(condition, condition)
        ways = {"enc": nn.ModuleDict(), "dec": nn.ModuleDict()}
        self.enc, self.dec = ways["enc"], ways["dec"]
        self.enc[named(sides[0], "conv")] = Conv(shape[0], config.channels, 3)
        seen = shape[0]
        for place in places(sides, widths, config.blocks, config.channels):
            # On the way up only the last block of a level has attention.
            attention = place.block and place.side in config.attention and (place.way == "enc" or place.last)
            ways[place.way][place.name] = Block(
                place.enter,
                place.leave,
                condition,
                style,
                resample=place.resample,
                attention=attention or place.middle,
            )
            if fourier and place.resample == "down":
                self.enc[named(place.side, "aux_residual")] = Conv(seen, place.leave, 3, "down", style.taps, late=True)
                seen = place.leave
        self.dec[named(sides[0], "aux_norm")] = Norm(widths[0], style.eps)
        self.dec[named(sides[0], "aux_conv")] = last = Conv(widths[0], shape[0], 3)
        for layer in (*self.children(), *self.enc.values()):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                glorot(layer)
        glorot(last, 1e-5)

    def condition(self, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        """``[B, E]``. Classes are told before the layers that time goes through."""
        cosines, sines = self.map_noise(noise_B).to(self.map_layer0.weight.dtype).chunk(2, dim=1)
        features = torch.cat((sines, cosines), dim=1)
        if self.map_label is not None:
            told = one_hot(label, self.num_classes, features)
            features = features + self.map_label(math.sqrt(self.num_classes) * told)
        time = self.map_layer1(F.silu(self.map_layer0(features)))
        return F.silu(time if added_BE is None else time + added_BE.to(time.dtype))

    def forward(self, x: Tensor, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            condition = self.condition(noise_B, label, added_BE)
        h = seen = x.to(self.map_layer0.weight.dtype)
        skips: list[Tensor] = []
        for key, layer in self.enc.items():
            if key.endswith("aux_residual"):
                h = seen = skips[-1] = (h + layer(seen)) * SQRT_HALF
                continue
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                h = layer(torch.cat((h, skips.pop()), dim=1) if h.shape[1] != layer.enter else h, condition)
            else:
                h = layer(h) if isinstance(layer, Norm) else layer(F.silu(h))
        return h


class DhariwalUNet(nn.Module):
    """ADM: ``net(x, noise, label, added) -> [B, C, H, W]``, without a preconditioner, in its weights' precision."""

    def __init__(self, shape: tuple[int, ...], config: EDMConfig, num_classes: int) -> None:
        super().__init__()
        style, sides = STYLES[config.arch], level_sides(shape, len(config.multipliers), config.kind)
        widths = [config.channels * times for times in config.multipliers]
        condition, augment = config.embedding * config.channels, config.augment_dim
        self.num_classes = num_classes
        self.map_noise = Sinusoids(config.channels, ends=False)
        self.map_augment = silent(nn.Linear(augment, config.channels, bias=False)) if augment else None
        self.map_layer0 = nn.Linear(config.channels, condition)
        self.map_layer1 = nn.Linear(condition, condition)
        self.map_label = nn.Linear(num_classes, condition, bias=False) if num_classes else None
        ways = {"enc": nn.ModuleDict(), "dec": nn.ModuleDict()}
        self.enc, self.dec = ways["enc"], ways["dec"]
        self.enc[named(sides[0], "conv")] = Conv(shape[0], widths[0], 3)
        for place in places(sides, widths, config.blocks, widths[0]):
            ways[place.way][place.name] = Block(
                place.enter,
                place.leave,
                condition,
                style,
                resample=place.resample,
                attention=place.middle or (place.block and place.side in config.attention),
            )
        self.out_norm = Norm(widths[0], style.eps)
        self.out_conv = Conv(widths[0], shape[0], 3)
        glorot(self.out_conv, 0.0)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def condition(self, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        """``[B, E]``."""
        features = self.map_noise(noise_B).to(self.map_layer0.weight.dtype)
        time = self.map_layer1(F.silu(self.map_layer0(features)))
        if added_BE is not None:
            time = time + added_BE.to(time.dtype)
        if self.map_label is not None:
            time = time + self.map_label(one_hot(label, self.num_classes, time))
        return F.silu(time)

    def forward(self, x: Tensor, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            condition = self.condition(noise_B, label, added_BE)
        h = x.to(self.map_layer0.weight.dtype)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.dec.values():
            h = layer(torch.cat((h, skips.pop()), dim=1) if h.shape[1] != layer.enter else h, condition)
        return self.out_conv(F.silu(self.out_norm(h)))


class EDM(nn.Module):
    """``net(x, sigma, label, added) -> D(x; sigma)``, ``[B, C, H, W]``: the data expected behind ``x = data + sigma
    noise``, in the precision of ``x``."""

    def __init__(self, shape: tuple[int, ...], config: EDMConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.condition = config.embedding * config.channels
        network = DhariwalUNet if config.arch == "adm" else SongUNet
        self.model = network(shape, config, num_classes)

    def forward(self, x: Tensor, tau_B: Tensor, label: Tensor | None = None, added_BE: Tensor | None = None) -> Tensor:
        sigma_B = tau_B.to(torch.promote_types(tau_B.dtype, torch.float32))
        around = scales(self.config.precond, sigma_B, self.config.sigma_data)
        return denoise(self.model, x, around, label, added_BE)
