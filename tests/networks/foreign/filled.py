"""Weights and inputs that any program can make again: pseudo-random numbers from a name and an index."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Float64 in [-1, 1), by integers alone: ``((c + 2654435761 j^2 + 40503 j) mod 2^32) / 2^31 - 1`` at index ``j``,
    ``c`` the CRC-32 of the name."""
    j = np.arange(int(np.prod(shape)), dtype=np.uint64)
    hashed = (np.uint64(zlib.crc32(name.encode())) + np.uint64(2654435761) * j * j + np.uint64(40503) * j) % 2**32
    return torch.from_numpy(hashed.astype(np.float64) / 2**31 - 1).reshape(shape)


def fill(net: nn.Module, *, leave: tuple[str, ...] = ()) -> None:
    """Weights of a matrix by ``numbers`` and of about unit size over what it sums, all others plainly so."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name not in leave:
                size = (3 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 1.0
                weight.copy_(size * numbers(name, tuple(weight.shape)))
