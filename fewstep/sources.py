"""Distributions at ``t = 1``: what a flow carries to the data.

Flow matching asks nothing of its source but that it can be drawn from. All of these have zero mean and unit variance
per coordinate, so that a time means the same proportion of noise to data whatever the source. What relies on Gaussian
noise (scores, diffusion teachers, closed-form teachers) does not go with the others.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.keys import Key

Source = Callable[[Key, str, Tensor, tuple[int, ...]], Tensor]
"""(key, purpose, index [B], shape) -> noise ``[B, *shape]`` float32, row ``b`` belonging to ``index[b]`` alone."""


def gaussian(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent standard normal coordinates."""
    return key.normal(purpose, index_B, shape)


def uniform(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform on the cube ``[-sqrt(3), sqrt(3)]^D``."""
    return ((2 * key.uniform(purpose, index_B, shape) - 1) * math.sqrt(3)).to(torch.float32)


def laplace(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent coordinates of density ``exp(-sqrt(2) |e|) / sqrt(2)``: heavier tails than the normal ones."""
    u = key.uniform(purpose, index_B, shape) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).to(torch.float32)


def sphere(key: Key, purpose: str, index_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform on the sphere of radius ``sqrt(D)``: Gaussian noise without the variation of its length."""
    e = key.normal(purpose, index_B, shape)
    flat = e.flatten(1)
    radius = math.sqrt(flat.shape[1])
    return (flat * (radius / flat.norm(dim=1, keepdim=True))).reshape(e.shape)


SOURCES: dict[str, Source] = {"gaussian": gaussian, "uniform": uniform, "laplace": laplace, "sphere": sphere}
"""The sources a config may name."""
