"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2312.02696): every layer keeps the size of what it is given,
and weights count by their direction alone.

Shapes: B batch, C channels, H and W pixels, E width of the condition, F features of time, A heads, N pixels as tokens,
K channels a head.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.foreign.config import EDM2Config
from fewstep.networks.foreign.edm_parts import (
    Resample,
    denoise,
    filter_of,
    level_sides,
    named,
    one_hot,
    places,
    resampled,
    scales,
    silent,
)


def normalise(x: Tensor, dims: tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """Unit root mean square over ``dims``. The size is measured in float32 at least."""
    size = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + size * math.sqrt(size.numel() / x.numel())).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU, as large as what it is given (equation 81)."""
    return F.silu(x) / 0.596


def mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """``a`` and a ``share`` of ``b``, as large as both (equation 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def joined(a_BCHW: Tensor, b_BCHW: Tensor, share: float) -> Tensor:
    """Both one after the other, each as loud as its share, however many channels it has (equation 103)."""
    sizes = a_BCHW.shape[1], b_BCHW.shape[1]
    scale = math.sqrt(sum(sizes)) / math.hypot(1 - share, share)
    first, second = scale * (1 - share) / math.sqrt(sizes[0]), scale * share / math.sqrt(sizes[1])
    return torch.cat((first * a_BCHW, second * b_BCHW), dim=1)


class Fourier(nn.Module):
    """``[B] -> [B, F]``: cosines of frequencies and phases drawn once (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, noise_B: Tensor) -> Tensor:
        freqs, phases = self.freqs.to(noise_B.dtype), self.phases.to(noise_B.dtype)
        return math.sqrt(2) * (noise_B[:, None] * freqs + phases).cos()


class Conv(nn.Module):
    """A linear map of pixels and their neighbours, or of vectors if ``kernel`` is 0, by the direction of its weights
    (equation 47). They are never altered here: training that keeps them short (equation 66) does so outside."""

    def __init__(self, enter: int, leave: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(leave, enter, *((kernel, kernel) if kernel else ())))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = normalise(weight, tuple(range(1, weight.ndim))) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """Figure 21: two convolutions beside the main path, then attention if it has it. A block of the way down
    (``enc``) turns its input to the new width at once, one of the way up (``dec``) at its end."""

    def __init__(
        self,
        enter: int,
        leave: int,
        condition: int,
        config: EDM2Config,
        *,
        way: Literal["enc", "dec"],
        resample: Resample = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.way = config, way
        self.resample: Resample = resample
        self.heads = leave // config.head_channels if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = Conv(leave if way == "enc" else enter, leave, 3)
        self.emb_linear = Conv(condition, leave, 0)
        self.conv_res1 = Conv(leave, leave, 3)
        self.conv_skip = Conv(enter, leave, 1) if enter != leave else None
        self.attn_qkv = Conv(leave, 3 * leave, 1) if self.heads else None
        self.attn_proj = Conv(leave, leave, 1) if self.heads else None

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        if self.resample != "keep":
            # Not a buffer: checkpoints have none.
            h_BCHW = resampled(h_BCHW, filter_of(self.config.resample_filter, h_BCHW.device), self.resample)
        if self.way == "enc":
            h_BCHW = normalise(h_BCHW if self.conv_skip is None else self.conv_skip(h_BCHW), (1,))
        inner = self.conv_res0(silu(h_BCHW))
        told = 1 + self.emb_linear(condition_BE, self.emb_gain)[:, :, None, None].to(inner.dtype)
        inner = self.conv_res1(silu(inner * told))
        if self.way == "dec" and self.conv_skip is not None:
            h_BCHW = self.conv_skip(h_BCHW)
        h_BCHW = mixed(h_BCHW, inner, self.config.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            # Channels are heads, then a head's own, then query, key and value: each normalised.
            parts = self.attn_qkv(h_BCHW).flatten(2).unflatten(1, (self.heads, -1, 3))
            q, k, v = normalise(parts, (2,)).transpose(2, 4).unbind(3)
            seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(h_BCHW.shape)
            h_BCHW = mixed(h_BCHW, self.attn_proj(seen), self.config.attn_balance)
        clip = self.config.clip
        return h_BCHW if clip is None else h_BCHW.clamp(-clip, clip)


class UNet(nn.Module):
    """Figure 21, without the preconditioner. The input has one more channel, of ones, in the place of a bias."""

    def __init__(self, shape: tuple[int, ...], config: EDM2Config, num_classes: int) -> None:
        super().__init__()
        sides = level_sides(shape, len(config.multipliers), config.kind)
        widths = [config.channels * times for times in config.multipliers]
        features = config.noise_channels or widths[0]
        condition = config.embedding_channels or max(widths)
        self.config, self.num_classes = config, num_classes
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = Fourier(features)
        self.emb_noise = Conv(features, condition, 0)
        self.emb_label = Conv(num_classes, condition, 0) if num_classes else None
        ways = {"enc": nn.ModuleDict(), "dec": nn.ModuleDict()}
        self.enc, self.dec = ways["enc"], ways["dec"]
        self.enc[named(sides[0], "conv")] = Conv(shape[0] + 1, widths[0], 3)
        for place in places(sides, widths, config.blocks, widths[0]):
            ways[place.way][place.name] = Block(
                place.enter,
                place.leave,
                condition,
                config,
                way=place.way,
                resample=place.resample,
                attention=place.middle or (place.block and place.side in config.attention),
            )
        self.out_conv = Conv(widths[0], shape[0], 3)

    def condition(self, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        """``[B, E]``, in the precision of time whatever that of the weights."""
        time = self.emb_noise(self.emb_fourier(noise_B))
        if added_BE is not None:
            time = time + added_BE.to(time.dtype)
        if self.emb_label is not None:
            told = one_hot(label, self.num_classes, time)
            time = mixed(time, self.emb_label(math.sqrt(self.num_classes) * told), self.config.label_balance)
        return silu(time)

    def forward(self, x: Tensor, noise_B: Tensor, label: Tensor | None, added_BE: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            condition = self.condition(noise_B, label, added_BE)
        h = x.to(self.out_conv.weight.dtype)
        h = torch.cat((h, torch.ones_like(h[:, :1])), dim=1)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            h = layer(h, condition) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for key, layer in self.dec.items():
            if "block" in key:
                h = joined(h, skips.pop(), self.config.concat_balance)
            h = layer(h, condition)
        return self.out_conv(h, self.out_gain)


class EDM2(nn.Module):
    """``net(x, sigma, label, added) -> D(x; sigma)``, ``[B, C, H, W]``: the data expected behind ``x = data + sigma
    noise``, in the precision of ``x``. ``logvar_*`` weighted the loss of its training and are used no more."""

    def __init__(self, shape: tuple[int, ...], config: EDM2Config, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.condition = config.embedding_channels or config.channels * max(config.multipliers)
        self.unet = UNet(shape, config, num_classes)
        self.logvar_fourier = Fourier(config.logvar_channels)
        self.logvar_linear = silent(Conv(config.logvar_channels, 1, 0))

    def forward(self, x: Tensor, tau_B: Tensor, label: Tensor | None = None, added_BE: Tensor | None = None) -> Tensor:
        sigma_B = tau_B.to(torch.promote_types(tau_B.dtype, torch.float32))
        return denoise(self.unet, x, scales("edm", sigma_B, self.config.sigma_data), label, added_BE)
