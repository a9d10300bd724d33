"""Distributions over the training time ``t`` and over pairs ``(t, r)`` with ``r <= t``.

A distribution is its inverse distribution function, applied to keyed uniforms: a sample's time depends on (seed,
purpose, step, index) alone. Times are float32 in (0, 1).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewstep.keys import Key

Times = Callable[[Tensor], Tensor]
"""Uniform numbers in (0, 1), float64 -> times in (0, 1), float64."""


def uniform(u: Tensor) -> Tensor:
    """``t ~ U(0, 1)``."""
    return u


def logit_normal(mean: float, std: float) -> Times:
    """``logit t ~ N(mean, std^2)`` (Esser et al. 2403.03206): a log-normal noise level ``sigma = t / (1 - t)``."""
    return partial(_logit_normal, mean=mean, std=std)


def _logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def sample_times(times: Times, key: Key, purpose: str, index_B: Tensor) -> Tensor:
    """One time per sample, ``[B]`` float32."""
    return times(key.uniform(purpose, index_B)).to(torch.float32)


def jump_rows(index_B: Tensor, fraction: float) -> Tensor:
    """Which samples of a batch make a jump (``r < t``), as a bool mask ``[B]``; the others stay on the diagonal.

    Row ``j`` of the global batch jumps where ``floor((j + 1) fraction)`` exceeds ``floor(j fraction)``: exactly the
    wanted share, spread evenly, a function of the sample index alone, hence the same for any number of processes.
    """
    j = index_B.to(torch.float64)
    # The small offset keeps products such as 3 * (1 / 3) on the right side of their integer.
    return torch.floor((j + 1) * fraction + 1e-9) > torch.floor(j * fraction + 1e-9)
