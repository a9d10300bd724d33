"""Weights and inputs by a rule, the same wherever and by whatever code they are used."""

import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor


def numbers(name: str, shape: Iterable[int]) -> np.ndarray:
    """Float64 numbers that look like noise of deviation 1: a chirp that starts where the name says."""
    shape = tuple(shape)
    k = np.arange(int(np.prod(shape)), dtype=np.float64) + zlib.crc32(name.encode()) % 10007
    return (np.sqrt(2) * np.sin(0.618 * k * k)).reshape(shape)


def weight(name: str, shape: Iterable[int]) -> Tensor:
    """As after training: none is zero, and none so large that activations explode.

    Matrices and kernels over the root of their inputs, norms around 1, biases and tables of a few tenths.
    """
    value = torch.from_numpy(numbers(name, shape))
    if value.ndim >= 2 and "emb." not in name:
        # NIN, whose names alone end so, has its matrix the other way round.
        inputs = value.shape[0] if name.endswith(".W") else value[0].numel()
        return value / inputs**0.5
    if value.ndim == 1 and name.endswith("weight"):
        return 1 + 0.2 * value
    return 0.3 * value


def weights(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float64 weights of the names and shapes of a state dict."""
    return {name: weight(name, value.shape) for name, value in like.items()}
