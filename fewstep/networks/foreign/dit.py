"""DiT (Peebles and Xie, 2212.09748), which is SiT's network (2401.08740) and REPA's (2410.06940) too.

Shapes: B batch, C image channels, H and W pixels, N patches (tokens), D width, also of the condition, K channels of a
head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.networks.foreign.config import DiTConfig
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


def places(side: int, width: int) -> Tensor:
    """``[N, D]``, the fixed embedding of a grid's ``side x side`` places, row by row.

    Half of the channels are sines, then cosines, of the column and half of the row, at frequencies
    ``10000^(-4 i / D)``.
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat((angle.sin(), angle.cos()), dim=1)
    return torch.cat((along.repeat(side, 1), along.repeat_interleave(side, dim=0)), dim=1)


class PatchEmbedder(nn.Module):
    """``[B, C, H, W] -> [B, N, D]``."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Softmax attention among patches; queries and keys are normalised within each head if ``qk_norm``.

    The kernel is torch's choice; the derivative along the path sets its own around the network.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, h_BND: Tensor) -> Tensor:
        q, k, v = self.qkv(h_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h_BND), approximate="tanh"))


class Block(nn.Module):
    """Attention, then an MLP for every patch; each normalised, modulated and gated by the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, config.heads, qk_norm=config.qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, round(config.mlp_ratio * width))
        self.adaLN_modulation = modulation(width, 6 * width)

    def forward(self, h_BND: Tensor, condition_BD: Tensor) -> Tensor:
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        h_BND = h_BND + a_gate[:, None] * self.attn(modulate(self.norm1(h_BND), a_shift, a_scale))
        return h_BND + m_gate[:, None] * self.mlp(modulate(self.norm2(h_BND), m_shift, m_scale))


class DiT(nn.Module):
    """``net(x, tau, label, added) -> [B, C, H, W]``: see ``Raw``.

    Where it was trained to say a variance too (``learn_sigma``), that is left out. ``UsageError`` for samples that it
    does not take.
    """

    def __init__(self, shape: tuple[int, ...], config: DiTConfig, num_classes: int) -> None:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UsageError(f"a network of kind dit takes square images, not samples of shape {list(shape)}")
        if shape[1] % config.patch:
            raise UsageError(f"a network of kind dit with patch {config.patch} does not divide a side of {shape[1]}")
        super().__init__()
        channels, side = shape[0], shape[1] // config.patch
        self.shape = shape
        self.condition = config.width
        self.patch = config.patch
        # Never trained, but among the parameters that a checkpoint has.
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, config.width), requires_grad=False)
        self.x_embedder = PatchEmbedder(channels, config.width, config.patch)
        self.t_embedder = TimeEmbedder(self.condition)
        self.y_embedder = LabelEmbedder(num_classes, self.condition, null_row=config.null_row)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        leave = config.patch**2 * channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(config.width, config.width, leave)
        self._initialise(side)

    @torch.no_grad()
    def _initialise(self, side: int) -> None:
        """As its projects do: the last layer says zero, every block is the identity."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.constant_(weight, float(name.endswith("_norm.weight")))
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(weight, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(weight)
            else:
                nn.init.xavier_uniform_(weight.flatten(1))
        self.pos_embed.copy_(places(side, self.pos_embed.shape[-1])[None])

    def forward(self, x: Tensor, tau_B: Tensor, label: Tensor | None = None, added_BE: Tensor | None = None) -> Tensor:
        h = self.x_embedder(x) + self.pos_embed
        condition = conditioned(self.t_embedder, self.y_embedder, tau_B, label, added_BE).to(h.dtype)
        for block in self.blocks:
            h = block(h, condition)
        return unpatchify(self.final_layer(h, condition).to(x.dtype), self.shape, self.patch)
