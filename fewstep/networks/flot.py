"""FloT, a flow transformer for images and latents.

Shapes: B batch, C image channels, H and W pixels, N patches (tokens), P numbers in a patch, D width, E width of the
condition, A heads, K channels of a head, R pairs of channels that rotate (``K / 2``).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import UsageError
from fewstep.networks.condition import ConditionedNetwork, Inputs
from fewstep.networks.config import FloTConfig

BASE = 100.0
"""Slowest rotation: one radian in about this many patches. Sides have tens of patches, where texts have thousands."""


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """``[B, C, H, W] -> [B, N, P]``: patches row by row, and within one its channels, rows and columns."""
    batch, channels, height, width = x_BCHW.shape
    tiles = x_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    # Every size by its number, so that an empty batch has a shape too.
    patches = (height // patch) * (width // patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, patches, channels * patch * patch)


def unpatchify(tokens_BNP: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """The inverse of ``patchify``, for images of ``shape`` ``(C, H, W)``."""
    channels, height, width = shape
    batch = len(tokens_BNP)
    tiles = tokens_BNP.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def angles(rows: int, columns: int, pairs: int, like: Tensor) -> Tensor:
    """``[N, R]``: by how much each pair of channels rotates at each patch of a ``rows x columns`` grid.

    Half of the pairs turn with the row and half with the column, at frequencies spaced geometrically from 1 towards
    ``1 / BASE``. Rotations of query and key differ by the angle of their offset, so their product knows no more.
    """
    frequencies = BASE ** -(torch.arange(pairs // 2, dtype=like.dtype, device=like.device) / (pairs // 2))
    row, column = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (rows, columns))
    by_row = (row[:, None] * frequencies).repeat_interleave(columns, dim=0)
    by_column = (column[:, None] * frequencies).repeat(rows, 1)
    return torch.cat((by_row, by_column), dim=1)


def rotate(x_BANK: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Rotate channels ``i`` and ``R + i`` of every head as a pair, by the ``i``-th angle of their patch."""
    a, b = x_BANK.chunk(2, dim=-1)
    return torch.cat((a * cos_NR - b * sin_NR, a * sin_NR + b * cos_NR), dim=-1)


def normalise(x_BANK: Tensor) -> Tensor:
    """RMS norm over a head's channels. Without weights, and from plain operations: every one has a derivative."""
    return x_BANK * torch.rsqrt(x_BANK.square().mean(dim=-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Softmax attention among patches with normalised queries and keys, rotated by where they are.

    Normalised, no score exceeds ``sqrt(K)`` whatever the weights: large ones are what bfloat16 and derivatives in time
    cannot bear. The kernel is torch's choice; the derivative along the path sets its own around the network.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, width)

    def forward(self, h_BND: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        q, k, v = self.enter(h_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # The angles are in full precision; products with them come back to that of the values.
        q, k = (rotate(normalise(part), cos_NR, sin_NR).to(v.dtype) for part in (q, k))
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP for every patch; each normalised, modulated and gated by the condition (adaLN-zero).

    GELU, where SwiGLU would put a third matrix and one more product: two large matrices are the least work for
    the same number of parameters, and the derivative along the path does all of it twice.
    """

    def __init__(self, width: int, heads: int, expansion: int, condition: int) -> None:
        super().__init__()
        # No affine part: the modulation supplies it, and affine norms break compiled forward-mode AD.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 6 * width)
        self.attention = Attention(width, heads)
        self.inner = nn.Linear(width, expansion * width)
        self.outer = nn.Linear(expansion * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h_BND: Tensor, condition_BE: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = self.modulation(condition_BE)[:, None].chunk(6, dim=-1)
        modulated = self.norm(h_BND) * (1 + a_scale) + a_shift
        h_BND = h_BND + a_gate * self.attention(modulated, cos_NR, sin_NR)
        modulated = self.norm(h_BND) * (1 + m_scale) + m_shift
        return h_BND + m_gate * self.outer(F.gelu(self.inner(modulated), approximate="tanh"))


class FloT(ConditionedNetwork):
    """``net(x, t, r, label, guidance) -> [B, C, H, W]`` under the conditions of ``ConditionedNetwork``; the output has
    the precision of ``x``. The last modulation, after all blocks, has the condition of the last of them.

    Rotations tell patches how they lie to each other. Where they lie is a learned vector per patch: without it patches
    that look the same would stay the same, and pure noise could not become a mean image.
    """

    def __init__(self, shape: tuple[int, ...], config: FloTConfig, inputs: Inputs) -> None:
        if len(shape) != 3:
            raise UsageError(f"a network of kind flot takes images, not samples of shape {list(shape)}")
        channels, height, width = shape
        patch = config.patch
        if height % patch or width % patch:
            raise UsageError(f"a network of kind flot with patch {patch} does not divide images of {height} x {width}")
        # Half as wide: the projections into every block would otherwise hold a third of the parameters.
        condition = config.width // 2
        super().__init__(condition, config.depth, inputs, max_frequency=config.max_frequency)
        self.shape = shape
        self.patch = patch
        self.grid = (height // patch, width // patch)
        self.pairs = config.width // config.heads // 2
        self.enter = nn.Linear(channels * patch * patch, config.width)
        # As large as a patch's own vector: started near zero, it takes hundreds of steps to be heard.
        self.place = nn.Parameter(0.5 * torch.randn(self.grid[0] * self.grid[1], config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.expansion, condition) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 2 * config.width)
        self.leave = nn.Linear(config.width, channels * patch * patch)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t_B: Tensor,
        r_B: Tensor,
        label_B: Tensor | None = None,
        guidance_B3: Tensor | None = None,
    ) -> Tensor:
        h = self.enter(patchify(x, self.patch).to(self.enter.weight.dtype)) + self.place
        conditions = self.conditions(t_B, r_B, label_B, guidance_B3, h.dtype)
        turn = angles(*self.grid, self.pairs, like=x)
        cos, sin = turn.cos(), turn.sin()
        for block, condition in zip(self.blocks, conditions, strict=True):
            h = block(h, condition, cos, sin)
        shift, scale = self.modulation(conditions[-1])[:, None].chunk(2, dim=-1)
        tokens = self.leave(self.norm(h) * (1 + scale) + shift)
        return unpatchify(tokens.to(x.dtype), self.shape, self.patch)
