"""What the diffusion transformers of several projects share with DiT (Peebles and Xie, 2212.09748), under its names.

Shapes: B batch, C image channels, H and W pixels, N patches (tokens), P numbers in a patch, D width, E width of the
condition.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
"""Features of a time."""


def features(tau_B: Tensor) -> Tensor:
    """``[cos(w_k tau), sin(w_k tau)]``, ``[B, 256]``, ``w_k = 10000^(-k / 128)``: in float32, or finer if ``tau`` is.

    Low precisions would not tell one of a thousand times from the next.
    """
    tau_B = tau_B.to(torch.promote_types(tau_B.dtype, torch.float32))
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=tau_B.dtype, device=tau_B.device)
    angle = tau_B[:, None] * torch.exp(-math.log(10000) * exponents / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeEmbedder(nn.Module):
    """``tau [B] -> [B, E]``: features and two linear layers, outside of any autocast."""

    def __init__(self, condition: int) -> None:
        super().__init__()
        inner, outer = nn.Linear(FREQUENCIES, condition), nn.Linear(condition, condition)
        self.mlp = nn.Sequential(inner, nn.SiLU(), outer)

    def forward(self, tau_B: Tensor) -> Tensor:
        with torch.autocast(tau_B.device.type, enabled=False):
            return self.mlp(features(tau_B).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class ids ``[B]`` -> ``[B, E]``. The last row, if there is a ``null_row``, stands for no class."""

    def __init__(self, num_classes: int, condition: int, *, null_row: bool) -> None:
        super().__init__()
        if not num_classes and not null_row:
            raise ValueError("a table of no classes has a row for no class, or none at all")
        self.null = num_classes if null_row else None
        self.embedding_table = nn.Embedding(num_classes + null_row, condition)

    def forward(self, label_B: Tensor | None, like_B: Tensor) -> Tensor:
        """``like`` has the batch and its device. ``ValueError`` for no label where no row stands for that."""
        if label_B is None:
            if self.null is None:
                raise ValueError("this network was trained with a class always: it cannot be asked without one")
            label_B = torch.full((len(like_B),), self.null, device=like_B.device)
        return self.embedding_table(label_B)


def conditioned(
    times: TimeEmbedder, labels: LabelEmbedder, tau_B: Tensor, label_B: Tensor | None, added_BE: Tensor | None
) -> Tensor:
    """The sum of the embeddings of time and class and of what is added between them, ``[B, E]``."""
    time = times(tau_B)
    if added_BE is not None:
        time = time + added_BE.to(time.dtype)
    return time + labels(label_B, tau_B).to(time.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a weight and a bias, applied after it: fused, they break compiled forward-mode AD."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=self.eps) * self.weight + self.bias


def modulation(condition: int, width: int) -> nn.Sequential:
    """From the condition to what scales, shifts and gates."""
    return nn.Sequential(nn.SiLU(), nn.Linear(condition, width))


def modulate(h_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return h_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


class FinalLayer(nn.Module):
    """``[B, N, D] -> [B, N, P]``, modulated once more."""

    def __init__(self, width: int, condition: int, leave: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, leave)
        self.adaLN_modulation = modulation(condition, 2 * width)

    def forward(self, h_BND: Tensor, condition_BE: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_BE).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h_BND), shift, scale))


def unpatchify(tokens_BNP: Tensor, shape: tuple[int, ...], patch: int) -> Tensor:
    """``[B, N, P] -> [B, C, H, W]`` for ``shape`` ``(C, H, W)``: within a patch rows, columns, then channels, of which
    those past the first C are left out."""
    channels, height, width = shape
    # Every size by its number, so that an empty batch has a shape too.
    said = tokens_BNP.shape[-1] // patch**2
    tiles = tokens_BNP.reshape(len(tokens_BNP), height // patch, width // patch, patch, patch, said)[..., :channels]
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens_BNP), channels, height, width)
