"""The U-Net of guided-diffusion (Dhariwal and Nichol 2105.05233) under its names, as torchcfm and flow_matching use it.

Shapes: B batch, C channels, H and W pixels, N pixels as tokens, A heads, K channels of a head, E width of the
embedding of time.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.networks.foreign.config import ADMConfig
from fewstep.networks.foreign.images import GroupNorm, check_image, clock


def norm(channels: int) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-5)


def zeroed(layer: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """The layer with weights that start at zero: what it ends starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def time_features(tau_B: Tensor, dim: int) -> Tensor:
    """``[B, dim]``: cosines, then sines, of ``tau`` at frequencies from 1 down towards 1 / 10000."""
    tau_B = clock(tau_B)
    k = torch.arange(dim // 2, dtype=tau_B.dtype, device=tau_B.device)
    angle = tau_B[:, None] * torch.exp(-math.log(10000) * k / (dim // 2))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class Downsample(nn.Module):
    """Half the resolution: a convolution, or the mean of four pixels."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return self.op(h_BCHW)


class Upsample(nn.Module):
    """Twice the resolution: every pixel four times, then a convolution or nothing."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(h_BCHW, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """``skip(h) + W2 silu(norm(W1 silu(norm(h)) + emb))``, or modulated by scale and shift from the embedding.

    ``resample`` changes the resolution of the branch, before its first convolution, and of what it is added to. The
    place of the dropout is kept, empty.
    """

    def __init__(
        self, enter: int, leave: int, condition: int, *, scale_shift: bool, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(norm(enter), nn.SiLU(), nn.Conv2d(enter, leave, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * leave if scale_shift else leave))
        self.out_layers = nn.Sequential(
            norm(leave), nn.SiLU(), nn.Identity(), zeroed(nn.Conv2d(leave, leave, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if enter == leave else nn.Conv2d(enter, leave, 1)

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:
        inner = self.in_layers[2](self.resample(self.in_layers[1](self.in_layers[0](h_BCHW))))
        told = self.emb_layers(condition_BE)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            branch = self.out_layers[1:](self.out_layers[0](inner) * (1 + scale) + shift)
        else:
            branch = self.out_layers(inner + told)
        return self.skip_connection(self.resample(h_BCHW)) + branch


class AttentionBlock(nn.Module):
    """``h + W softmax(q k / sqrt(K)) v`` among all pixels of an image.

    Channels of ``qkv`` are those of each head in turn, each with its q, k and v; ``new_order``: q of all heads, then k,
    then v.
    """

    def __init__(self, channels: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        qkv_BCN = self.qkv(self.norm(h_BCHW).flatten(2))
        if self.new_order:
            q, k, v = qkv_BCN.unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv_BCN.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2).unbind(2)
        seen_BCN = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return h_BCHW + self.proj_out(seen_BCN).reshape(h_BCHW.shape)


class Stage(nn.Sequential):
    """Layers in turn, of which residual blocks are told the embedding."""

    def forward(self, h_BCHW: Tensor, condition_BE: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            h_BCHW = layer(h_BCHW, condition_BE) if isinstance(layer, ResBlock) else layer(h_BCHW)
        return h_BCHW


class ADM(nn.Module):
    """``net(x, tau, label, added) -> [B, C, H, W]`` in the precision of ``x``: what the weights' project calls its
    model's output, without a learned sigma.

    ``tau [B]`` is the time as that project gives it. Label ``num_classes`` and None are no class, the last row of the
    table of classes; without such a row (``null_row``) None is a ``ValueError``. ``added [B, E]`` is added to the
    embedding of time. An unconditional network ignores labels.
    """

    def __init__(self, shape: tuple[int, ...], config: ADMConfig, num_classes: int) -> None:
        super().__init__()
        widths, deepest = config.widths, len(config.widths) - 1
        check_image(config.kind, shape, len(widths))
        channels = shape[0]
        self.condition = 4 * config.model_channels
        self.features = config.model_channels
        self.num_classes = num_classes
        self.null_row = config.null_row
        self.channels = channels

        def block(enter: int, leave: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(enter, leave, self.condition, scale_shift=config.use_scale_shift_norm, resample=resample)

        def attention(level: int, *, up: bool = False) -> AttentionBlock:
            heads = config.heads(level, up=up)
            return AttentionBlock(widths[level], heads, new_order=config.use_new_attention_order)

        def down(width: int) -> nn.Module:
            if config.resblock_updown:
                return block(width, width, Downsample(width, conv=False))
            return Downsample(width, conv=config.conv_resample)

        def up(width: int) -> nn.Module:
            if config.resblock_updown:
                return block(width, width, Upsample(width, conv=False))
            return Upsample(width, conv=config.conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(self.features, self.condition), nn.SiLU(), nn.Linear(self.condition, self.condition)
        )
        if num_classes:
            null = num_classes if config.null_row else None
            # As in flow_matching, the row for no class starts at zero and gets no gradient.
            self.label_emb = nn.Embedding(num_classes + config.null_row, self.condition, padding_idx=null)

        h = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(channels, h, 3, padding=1))])
        skips = [h]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [block(h, width)]
                if level in config.attention_levels:
                    layers.append(attention(level))
                self.input_blocks.append(Stage(*layers))
                h = width
                skips.append(h)
            if level < deepest:
                self.input_blocks.append(Stage(down(h)))
                skips.append(h)
        self.middle_block = Stage(block(h, h), attention(deepest), block(h, h))
        self.output_blocks = nn.ModuleList()
        for level in range(deepest, -1, -1):
            for number in range(config.num_res_blocks + 1):
                layers = [block(h + skips.pop(), widths[level])]
                h = widths[level]
                if level in config.attention_levels:
                    layers.append(attention(level, up=True))
                if level > 0 and number == config.num_res_blocks:
                    layers.append(up(h))
                self.output_blocks.append(Stage(*layers))
        leave = 2 * channels if config.learn_sigma else channels
        self.out = nn.Sequential(norm(h), nn.SiLU(), zeroed(nn.Conv2d(h, leave, 3, padding=1)))

    def forward(
        self, x: Tensor, tau_B: Tensor, label_B: Tensor | None = None, added_BE: Tensor | None = None
    ) -> Tensor:
        h = x.to(self.get_parameter("input_blocks.0.0.weight").dtype)
        condition_BE = self.conditions(tau_B, label_B, added_BE).to(h.dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, condition_BE)
            skips.append(h)
        h = self.middle_block(h, condition_BE)
        for stage in self.output_blocks:
            h = stage(torch.cat((h, skips.pop()), dim=1), condition_BE)
        return self.out(h)[:, : self.channels].to(x.dtype)

    def conditions(self, tau_B: Tensor, label_B: Tensor | None, added_BE: Tensor | None) -> Tensor:
        """The embedding of time, of what is added to it and of the class, ``[B, E]``."""
        with torch.autocast(tau_B.device.type, enabled=False):
            features = time_features(tau_B, self.features)
            condition_BE = self.time_embed(features.to(self.get_parameter("time_embed.0.weight").dtype))
        if added_BE is not None:
            condition_BE = condition_BE + added_BE
        if not self.num_classes:
            return condition_BE
        if label_B is None:
            if not self.null_row:
                raise ValueError("this network was trained with a class always: it cannot be asked without one")
            label_B = torch.full((len(tau_B),), self.num_classes, device=tau_B.device)
        return condition_BE + self.label_emb(label_B)
