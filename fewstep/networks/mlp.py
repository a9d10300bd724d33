"""A residual MLP for small images and 2-D data.

Shapes: B batch, D flattened sample, W width, C width of the condition.
"""

import math

import torch
from torch import Tensor, nn

from fewstep.networks.config import MLPConfig
from fewstep.networks.embeddings import TimeEmbedding


class Block(nn.Module):
    """``h + gate * W2 silu(W1 modulate(norm(h)))`` with shift, scale and gate from the condition (adaLN-zero)."""

    def __init__(self, width: int, expansion: int, condition: int) -> None:
        super().__init__()
        # No affine part: the modulation supplies it, and affine norms break compiled forward-mode AD.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition, 3 * width)
        self.inner = nn.Linear(width, expansion * width)
        self.outer = nn.Linear(expansion * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h_BW: Tensor, condition_BC: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition_BC).chunk(3, dim=-1)
        modulated = self.norm(h_BW) * (1 + scale) + shift
        return h_BW + gate * self.outer(nn.functional.silu(self.inner(modulated)))


class MLP(nn.Module):
    """``net(x, t, r, label) -> [B, *D]`` with the condition ``emb(t) + emb(t - r) + emb(label)``.

    A network of one time has no ``emb(t - r)`` and ignores ``r``. The second time enters additively through an
    embedding of ``t - r`` whose last layer starts at zero: a network that has just copied a teacher's weights returns
    the teacher's velocity for every ``r``, to the bit. Label
    ``num_classes`` is the null label; ``label = None`` means null. The output has the
    precision of ``x``.
    """

    def __init__(self, shape: tuple[int, ...], config: MLPConfig, num_classes: int, *, two_times: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        dim, width = math.prod(shape), config.width
        # Half as wide: the projections into every block would otherwise hold more than a third of the parameters.
        condition = width // 2
        self.embed_t = TimeEmbedding(condition, max_frequency=config.max_frequency, zero=False)
        self.embed_gap = TimeEmbedding(condition, max_frequency=config.max_frequency, zero=True) if two_times else None
        self.embed_label = nn.Embedding(num_classes + 1, condition) if num_classes else None
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, config.expansion, condition) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        condition = self.embed_t(t_B)
        if self.embed_gap is not None:
            condition = condition + self.embed_gap(t_B - r_B)
        if self.embed_label is not None:
            if label_B is None:
                label_B = torch.full((len(x),), self.num_classes, device=x.device)
            condition = condition + self.embed_label(label_B)
        h = self.enter(x.flatten(1).to(self.enter.weight.dtype))
        condition = nn.functional.silu(condition).to(h.dtype)
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(self.norm(h)).to(x.dtype).reshape(x.shape)
