"""Weights of a regression of velocities, as functions of the time: which prediction's error counts.

An error ``dv`` of the velocity at ``t`` is one of ``-t dv`` in the data and of ``(1 - t) dv`` in the noise, so that a
loss of either is the velocity's with a weight. All of shape ``[B] -> [B]``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

TimeWeight = Callable[[Tensor], Tensor]


def velocity_weight(t_B: Tensor) -> Tensor:
    """1: the loss of the velocity itself. Within a factor of four of truncated SNR at every time."""
    return torch.ones_like(t_B)


def data_weight(t_B: Tensor) -> Tensor:
    """``t^2``: the loss of the data prediction, ``xhat = x_t - t v``."""
    return t_B**2


def noise_weight(t_B: Tensor) -> Tensor:
    """``(1 - t)^2``: the loss of the noise prediction, ``ehat = x_t + (1 - t) v``. Nothing counts at ``t = 1``."""
    return (1 - t_B) ** 2


def snr_plus_one_weight(t_B: Tensor) -> Tensor:
    """``t^2 + (1 - t)^2``: the loss of the velocity of the variance-preserving path (2202.00512, section 4)."""
    return t_B**2 + (1 - t_B) ** 2


def truncated_snr_weight(t_B: Tensor) -> Tensor:
    """``max(t^2, (1 - t)^2)``: the worse of data and noise (2202.00512, section 4)."""
    return torch.maximum(t_B, 1 - t_B) ** 2


def edm_weight(sigma_data: float) -> TimeWeight:
    """``(t^2 + s^2 (1 - t)^2) / s^2`` for data of standard deviation ``s``: EDM's weight of the data prediction (Karras
    et al. 2206.00364, table 1), which makes the loss of a network that predicts nothing one at every time."""

    def weight(t_B: Tensor) -> Tensor:
        return (t_B / sigma_data) ** 2 + (1 - t_B) ** 2

    return weight


TIME_WEIGHTS: dict[str, TimeWeight] = {
    "velocity": velocity_weight,
    "data": data_weight,
    "noise": noise_weight,
    "snr_plus_one": snr_plus_one_weight,
    "truncated_snr": truncated_snr_weight,
}
"""Those without a number of their own, by the name a config has for them."""
