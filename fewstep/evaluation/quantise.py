"""From samples to images: the one quantisation between a model and its features. Never through a lossy format."""

import torch
from torch import Tensor


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, to uint8 by ``(127.5 x + 128)`` clamped to [0, 255], cut to an integer.

    The integer ``u`` stands for the bin around ``u / 127.5 - 1``; -1, 0 and 1 become 0, 128 and 255. Non-finite values
    are a ``ValueError``: a NaN has no grey level, and hiding it would flatter a diverged model.
    """
    _check(x)
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def clamped_fraction(x: Tensor) -> float:
    """The share of values outside [-1, 1], which quantisation clips. Few-step students overshoot; reports show it."""
    _check(x)
    return float((x.abs() > 1).double().mean())


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"images in [-1, 1] are floating point, got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum()) if x.ndim > 1 else 1
        raise ValueError(f"{bad} of {len(x)} samples hold NaN or infinite values: the model diverged")
