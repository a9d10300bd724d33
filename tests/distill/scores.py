"""Scores: is the mean of a loss's gradient zero at a field that should be its minimiser?

With a field ``v`` in the place of its student the gradient of an objective's loss in ``v``, times any function of the
state and the label, has mean zero if and only if ``v`` is the minimiser. A score is that mean over its standard error.

One dimension; N samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fewstep.data.dataset import Batch
from fewstep.distill.flow_matching import FlowMatching
from fewstep.keys import Key

Array = NDArray[np.float64]
KEY = Key(5, 2)


class Field(nn.Module):
    """A velocity field where the objective has its student. Keeps what it was asked and what it said."""

    def __init__(self, velocity: Callable[..., Tensor]) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        self.x = x.detach()
        given = (self.x, t_B) if label_B is None else (self.x, t_B, label_B)
        self.v = self.velocity(*given).detach().requires_grad_()
        return self.v


def gradient(
    velocity: Callable[..., Tensor], x: Tensor, time: float, label: Tensor | None = None, **settings: Any
) -> tuple[Array, Array, Array]:
    """States, velocities and the gradients of the loss in these, ``[N]`` each, of data ``x [N, 1]`` at one time of the
    path; ``velocity`` is a function of (state, linear time), and of the label where there is one. ``settings`` are
    those of flow matching."""
    field = Field(velocity)
    settings = {"label_dropout": 0.0, "null_label": 0, "times": lambda u: torch.full_like(u, time), **settings}
    FlowMatching(field, **settings)(Batch(x, label, torch.arange(len(x))), KEY).per_sample_B.sum().backward()
    return tuple(value[:, 0].numpy() for value in (field.x, field.v.detach(), field.v.grad))


def products(x_t: Array, v: Array, gradient: Array) -> Array:
    """``gradient phi_k(x_t)``, ``[N, 10]``: powers, the field itself, a wave, and five bins."""
    z = (x_t - x_t.mean()) / x_t.std()
    edges = [-np.inf, -1.0, -0.3, 0.3, 1.0, np.inf]
    bins = [((z > low) & (z <= high)).astype(float) for low, high in pairwise(edges)]
    return gradient[:, None] * np.stack([np.ones_like(z), z, z**2, v, np.sin(2 * z), *bins], axis=1)


def bound(numbers: int) -> float:
    """Two-sided, 1e-3 for all of them together."""
    return float(scipy.stats.norm.isf(0.5e-3 / numbers))


@dataclass(frozen=True)
class Mean:
    """Estimates ``[K]`` of means and their standard errors."""

    value: Array
    error: Array

    @property
    def score(self) -> float:
        """The largest in size. An error below 2e-5 is less than the tolerance of a plan leaves."""
        return float(np.abs(self.value / np.maximum(self.error, 2e-5)).max())


def mean_of(values: Array, controls: Array | None = None) -> Mean:
    """Of independent rows ``[N, K]``. ``controls [N, J]`` have mean zero: the intercept of a regression on them has the
    same expectation as the mean, and the smaller error."""
    columns = [np.ones((len(values), 1)), *([] if controls is None else [controls])]
    design = np.concatenate(columns, axis=1)
    fitted, *_ = np.linalg.lstsq(design, values, rcond=None)
    left = values - design @ fitted
    variance = (left**2).sum(axis=0) / (len(values) - design.shape[1])
    return Mean(fitted[0], np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))
