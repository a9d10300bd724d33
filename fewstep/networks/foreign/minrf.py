"""minRF's transformer: convolutions, then blocks with rotated queries and keys, modulated as DiT's are.

Shapes: B batch, C image channels, H and W pixels, N patches (tokens), D width, E width of the condition, A heads, K
channels of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.networks.flot import patchify
from fewstep.networks.foreign.config import MinRFConfig
from fewstep.networks.foreign.transformer import (
    FinalLayer,
    LabelEmbedder,
    LayerNorm,
    TimeEmbedder,
    conditioned,
    modulate,
    modulation,
    unpatchify,
)

WIDEST = 1024
"""The condition is as wide as the patches are, and never wider than this."""


def turns(tokens: int, channels: int, like: Tensor) -> Tensor:
    """``[N, K / 2]``: pair ``i`` of token ``n`` turns by ``n 10000^(-2 i / K)``, in the precision of ``like`` or in
    float32 if that is lower. Tokens are counted row by row: the rotation knows no rows."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000.0 ** -(torch.arange(0, channels, 2, dtype=dtype, device=like.device) / channels)
    return torch.arange(tokens, dtype=dtype, device=like.device)[:, None] * frequencies


def rotate(h_BNAK: Tensor, turn_NR: Tensor) -> Tensor:
    """Rotate channels ``2 i`` and ``2 i + 1`` of every head by the ``i``-th angle of its token."""
    even, odd = h_BNAK.to(turn_NR.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn_NR.cos()[:, None], turn_NR.sin()[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class GroupNorm(nn.Module):
    """Group norm in 32 groups with a weight and a bias per channel, applied after it as in ``LayerNorm``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        # The forward derivative takes contiguous input alone.
        normed = F.group_norm(h_BCHW.contiguous(), 32)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """Softmax attention among patches; queries and keys are normalised across all heads, then rotated.

    The kernel is torch's choice; the derivative along the path sets its own around the network.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.q_norm = LayerNorm(width)
        self.k_norm = LayerNorm(width)

    def forward(self, h_BND: Tensor, turn_NR: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.wq(h_BND)), self.k_norm(self.wk(h_BND)), self.wv(h_BND)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        q, k = (rotate(part, turn_NR).to(v.dtype) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``w2 (silu(w1 h) w3 h)``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, h_BND: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(h_BND)) * self.w3(h_BND))


class Block(nn.Module):
    """Attention, then the feed-forward; each normalised, modulated and gated by the condition."""

    def __init__(self, config: MinRFConfig, condition: int) -> None:
        super().__init__()
        width = config.width
        self.attention = Attention(width, config.heads)
        self.feed_forward = FeedForward(width, config.hidden)
        self.attention_norm = LayerNorm(width)
        self.ffn_norm = LayerNorm(width)
        self.adaLN_modulation = modulation(condition, 6 * width)

    def forward(self, h_BND: Tensor, condition_BE: Tensor, turn_NR: Tensor) -> Tensor:
        a_shift, a_scale, a_gate, f_shift, f_scale, f_gate = self.adaLN_modulation(condition_BE).chunk(6, dim=1)
        attended = self.attention(modulate(self.attention_norm(h_BND), a_shift, a_scale), turn_NR)
        h_BND = h_BND + a_gate[:, None] * attended
        return h_BND + f_gate[:, None] * self.feed_forward(modulate(self.ffn_norm(h_BND), f_shift, f_scale))


class MinRF(nn.Module):
    """``net(x, tau, label, added) -> [B, C, H, W]``: see ``Raw``. ``UsageError`` for samples that it does not take."""

    def __init__(self, shape: tuple[int, ...], config: MinRFConfig, num_classes: int) -> None:
        if len(shape) != 3:
            raise UsageError(f"a network of kind minrf takes images, not samples of shape {list(shape)}")
        channels, height, width = shape
        if height % config.patch or width % config.patch:
            raise UsageError(
                f"a network of kind minrf with patch {config.patch} does not divide images of {height} x {width}"
            )
        super().__init__()
        self.shape = shape
        self.condition = min(config.width, WIDEST)
        self.patch = config.patch
        self.channels = config.width // config.heads
        half = config.width // 2
        self.init_conv_seq = nn.Sequential(
            nn.Conv2d(channels, half, 5, padding=2),
            nn.SiLU(),
            GroupNorm(half),
            nn.Conv2d(half, half, 5, padding=2),
            nn.SiLU(),
            GroupNorm(half),
        )
        self.x_embedder = nn.Linear(config.patch**2 * half, config.width)
        self.t_embedder = TimeEmbedder(self.condition)
        self.y_embedder = LabelEmbedder(num_classes, self.condition, null_row=config.null_row)
        self.layers = nn.ModuleList(Block(config, self.condition) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, self.condition, config.patch**2 * channels)
        # As its project does: torch's own, but that it says zero at first.
        nn.init.zeros_(self.x_embedder.bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(self, x: Tensor, tau_B: Tensor, label: Tensor | None = None, added_BE: Tensor | None = None) -> Tensor:
        convolved = self.init_conv_seq(x.to(self.x_embedder.weight.dtype))
        h = self.x_embedder(patchify(convolved, self.patch))
        condition = conditioned(self.t_embedder, self.y_embedder, tau_B, label, added_BE).to(h.dtype)
        turn = turns(h.shape[1], self.channels, like=h)
        for layer in self.layers:
            h = layer(h, condition, turn)
        return unpatchify(self.final_layer(h, condition).to(x.dtype), self.shape, self.patch)
