"""Toy data in one and two dimensions, drawn by keyed random numbers: point ``i`` depends on (seed, ``i``) alone.

Every toy is a function ``(count, seed) -> Toy`` with coordinates of order one, about [-1, 1]. Those that are Gaussian
mixtures expose their parameters as a ``MixtureSpec``, from which ``MixtureTeacher.from_spec`` makes their exact
velocity.

Shapes: N points, D coordinates, K components.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.keys import Key


@dataclass(frozen=True, eq=False)
class Toy:
    """Points ``x [N, D]`` float32 with their classes ``label [N]`` int64, or None where no classes are natural."""

    x: Tensor
    label: Tensor | None


@dataclass(frozen=True)
class MixtureSpec:
    """The mixture ``sum_k weights[k] N(means[k], stds[k]^2 I)``; component k is of class ``component_label[k]``."""

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]
    component_label: tuple[int, ...] = ()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``weights [K]``, ``means [K, D]`` and ``stds [K]`` in float64."""
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        return weights, means, stds


EIGHT_GAUSSIANS = MixtureSpec(
    weights=(0.125,) * 8,
    means=tuple((0.8 * math.cos(k * math.pi / 4), 0.8 * math.sin(k * math.pi / 4)) for k in range(8)),
    stds=(0.08,) * 8,
    component_label=tuple(range(8)),
)
"""Eight equal modes on a circle of radius 0.8, one class each, counted anticlockwise from (0.8, 0)."""

MIXTURE = MixtureSpec(
    weights=(0.5, 0.3, 0.2),
    means=((-0.6, -0.3), (0.5, -0.5), (0.2, 0.6)),
    stds=(0.2, 0.1, 0.15),
    component_label=(0, 1, 2),
)
"""Three unequal modes in the plane, one class each."""

MIXTURE_1D = MixtureSpec(
    weights=(0.5, 0.3, 0.2),
    means=((-1.2,), (0.3,), (1.5,)),
    stds=(0.25, 0.15, 0.3),
    component_label=(0, 1, 2),
)
"""Three unequal modes on the line, one class each. In one dimension the teacher's flow map is known exactly."""


def checkerboard(count: int, seed: int) -> Toy:
    """Uniform on the eight dark squares of a 4 x 4 board over [-1, 1]^2. No classes."""
    u_N3 = Key(seed).uniform("toy/checkerboard", torch.arange(count), (3,))
    column = (4 * u_N3[:, 0]).floor()
    row = 2 * (2 * u_N3[:, 1]).floor() + column % 2  # a column holds every second row, shifted by its parity
    x = torch.stack((4 * u_N3[:, 0], row + u_N3[:, 2]), dim=-1) / 2 - 1
    return Toy(x.float(), None)


def two_moons(count: int, seed: int) -> Toy:
    """Two interleaved half circles of radius 2/3 with noise of std 0.05: class 0 is the upper, class 1 the lower."""
    key, index = Key(seed), torch.arange(count)
    u_N2 = key.uniform("toy/two_moons", index, (2,))
    lower, angle = u_N2[:, 0] >= 0.5, math.pi * u_N2[:, 1]
    upper_x, upper_y = angle.cos() - 0.5, angle.sin() - 0.25
    # Half a turn about the origin takes one moon to the other.
    sign = torch.where(lower, -1.0, 1.0)
    x = torch.stack((sign * upper_x, sign * upper_y), dim=-1) * (2 / 3)
    return Toy(x.float() + 0.05 * key.normal("toy/two_moons/noise", index, (2,)), lower.long())


def eight_gaussians(count: int, seed: int) -> Toy:
    """Draws from ``EIGHT_GAUSSIANS``, eight classes."""
    return _from_spec(EIGHT_GAUSSIANS, count, seed)


def mixture(count: int, seed: int) -> Toy:
    """Draws from ``MIXTURE``, three classes."""
    return _from_spec(MIXTURE, count, seed)


def mixture_1d(count: int, seed: int) -> Toy:
    """Draws from ``MIXTURE_1D``, points ``[N, 1]``, three classes."""
    return _from_spec(MIXTURE_1D, count, seed)


TOYS: dict[str, Callable[[int, int], Toy]] = {
    "checkerboard": checkerboard,
    "two_moons": two_moons,
    "eight_gaussians": eight_gaussians,
    "mixture": mixture,
    "mixture_1d": mixture_1d,
}


def draw_mixture(weights: Tensor, means_KD: Tensor, stds_K: Tensor, key: Key, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Exact draws ``x [N, D]`` (dtype of ``means``) of a Gaussian mixture and their components ``[N]`` int64.

    ``weights`` are ``[K]``, or ``[N, K]`` for a mixture per draw; they need not sum to one, and may be zero.
    """
    u_N = key.uniform("mixture/component", index_N)
    boundary = weights.double().cumsum(dim=-1)
    component_N = (u_N[:, None] * boundary[..., -1:] >= boundary).sum(dim=-1)
    noise_ND = key.normal("mixture/noise", index_N, (means_KD.shape[1],)).to(means_KD.dtype)
    return means_KD[component_N] + stds_K[component_N, None] * noise_ND, component_N


def _from_spec(spec: MixtureSpec, count: int, seed: int) -> Toy:
    x, component = draw_mixture(*spec.tensors(), Key(seed), torch.arange(count))
    label = torch.tensor(spec.component_label)[component] if spec.component_label else None
    return Toy(x.float(), label)
