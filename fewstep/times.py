"""Distributions over the training time ``t`` and over pairs ``(t, r)`` with ``r <= t``.

A distribution is its inverse distribution function, applied to keyed uniforms: a sample's time depends on (seed,
purpose, step, index) alone. Times are float32 in (0, 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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


def truncated_log_normal(mean: float, std: float, sigma_min: float, sigma_max: float) -> Times:
    """``ln sigma ~ N(mean, std^2)`` given ``sigma_min <= sigma <= sigma_max``, ``sigma = t / (1 - t)``: exact, no
    draw is clipped or rejected. EDM's noise levels (Karras et al. 2206.00364) have mean -1.2 and std 1.2."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels run from sigma_min to a larger sigma_max, got {sigma_min:g} and {sigma_max:g}")
    low, high = ((math.log(sigma) - mean) / std for sigma in (sigma_min, sigma_max))
    return partial(_truncated_log_normal, mean=mean, std=std, low=low, high=high)


def _truncated_log_normal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    # In the upper tail the distribution function rounds to one: there the mirror image is inverted.
    side = -1.0 if low > 0 else 1.0
    # Not ndtr: torch takes it from erf, which leaves no digits beyond eight deviations.
    mass_low, mass_high = (torch.special.log_ndtr(torch.tensor(side * z, dtype=u.dtype)).exp() for z in (low, high))
    z = side * torch.special.ndtri(mass_low + u * (mass_high - mass_low))
    return torch.sigmoid(mean + std * z.clamp(low, high))


def u_shaped(sharpness: float) -> Times:
    """Density in proportion to ``exp(a t) + exp(a (1 - t))``, ``a = sharpness``: most draws near both ends (Lee et al.
    2405.20320, section 4.1, with ``a = 4``, for training on pairs of noise and its sample)."""
    return partial(_u_shaped, sharpness=sharpness)


def _u_shaped(u: Tensor, sharpness: float) -> Tensor:
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(sharpness / 2)) / sharpness


def shifted(times: Times, shift: float) -> Times:
    """``t -> a t / (1 + (a - 1) t)``, ``a = shift``: adds ``ln a`` to ``logit t`` (Esser et al. 2403.03206, equation
    23). Above 1 it moves the draws towards noise, as larger images need."""
    return partial(_shifted, times=times, shift=shift)


def _shifted(u: Tensor, times: Times, shift: float) -> Tensor:
    t = times(u)
    return shift * t / (1 + (shift - 1) * t)


def sample_times(times: Times, key: Key, purpose: str, index_B: Tensor) -> Tensor:
    """One time per sample, ``[B]`` float32."""
    return times(key.uniform(purpose, index_B)).to(torch.float32)


@dataclass(frozen=True)
class TimePairs:
    """Where jumps start, ``t [B]``, and where they end, ``r [B]`` with ``r <= t``."""

    t: Tensor
    r: Tensor


def sample_pairs(times: Times, key: Key, index_B: Tensor, jump_B: Tensor) -> TimePairs:
    """Two draws per sample in order (Geng et al. 2505.13447, section 4.3), and ``r = t`` where ``jump`` is false."""
    first = sample_times(times, key, "time", index_B)
    second = sample_times(times, key, "second_time", index_B)
    t = torch.maximum(first, second)
    return TimePairs(t, torch.where(jump_B, torch.minimum(first, second), t))


def jump_rows(index_B: Tensor, fraction: float) -> Tensor:
    """Which samples of a batch make a jump (``r < t``), as a bool mask ``[B]``; the others stay on the diagonal.

    Row ``j`` of the global batch jumps where ``floor((j + 1) fraction)`` exceeds ``floor(j fraction)``: exactly the
    wanted share, spread evenly, a function of the sample index alone, hence the same for any number of processes.
    """
    j = index_B.to(torch.float64)
    # The small offset keeps products such as 3 * (1 / 3) on the right side of their integer.
    return torch.floor((j + 1) * fraction + 1e-9) > torch.floor(j * fraction + 1e-9)
