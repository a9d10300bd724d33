"""A residual MLP for small images and 2-D data.

Shapes: B batch, D flattened sample, W width, C width of the condition.
"""

import math

from torch import Tensor, nn

from fewstep.networks.condition import ConditionedNetwork, Inputs
from fewstep.networks.config import MLPConfig


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


class MLP(ConditionedNetwork):
    """``net(x, t, r, label, guidance) -> [B, *D]``: a row of blocks under the conditions of ``ConditionedNetwork``.

    The output has the precision of ``x``.
    """

    def __init__(self, shape: tuple[int, ...], config: MLPConfig, inputs: Inputs) -> None:
        dim, width = math.prod(shape), config.width
        # Half as wide: the projections into every block would otherwise hold more than a third of the parameters.
        condition = width // 2
        super().__init__(condition, config.depth, inputs, max_frequency=config.max_frequency)
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, config.expansion, condition) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        x: Tensor,
        t_B: Tensor,
        r_B: Tensor,
        label_B: Tensor | None = None,
        guidance_B3: Tensor | None = None,
    ) -> Tensor:
        h = self.enter(x.flatten(1).to(self.enter.weight.dtype))
        conditions = self.conditions(t_B, r_B, label_B, guidance_B3, h.dtype)
        for block, condition in zip(self.blocks, conditions, strict=True):
            h = block(h, condition)
        return self.leave(self.norm(h)).to(x.dtype).reshape(x.shape)
