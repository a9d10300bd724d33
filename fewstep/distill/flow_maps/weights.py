"""What a residual costs: the loss of a sample from ``Delta [B, *D]``, its deviation from the target.

A weight is a function ``(delta, t [B], r [B]) -> loss [B]``. The plain mean square is the one whose minimiser is the
conditional mean; the others trade that for steadiness, and with targets as noisy as ``e - x`` in few dimensions the
robust ones find something else (a mode).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.distill.objective import mean_square
from fewstep.networks.embeddings import TimeEmbedding

Weight = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
    """``||Delta||^2 / D``."""
    return mean_square(delta)


@dataclass(frozen=True)
class AdaptivePower:
    """``||Delta||^2 / sg(||Delta||^2 + c)^p`` (Geng et al. 2505.13447, equation 22; the norm is a sum over the
    coordinates, which fixes the scale of ``c``). With ``p = 1`` it is about one whatever happens."""

    power: float
    offset: float

    def __call__(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        square = delta.flatten(1).square().sum(dim=1)
        return square / (square.detach() + self.offset) ** self.power


@dataclass(frozen=True)
class PseudoHuber:
    """``sqrt(||Delta||^2 + c^2) - c`` with ``c = scale sqrt(D)`` (Song and Dhariwal 2310.14189, equation 7)."""

    scale: float

    def __call__(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        square = delta.flatten(1).square().sum(dim=1)
        c = self.scale * delta[0].numel() ** 0.5
        return square / ((square + c**2).sqrt() + c)


@dataclass(frozen=True)
class NormalisedTangent:
    """``||Delta||^2 / sg(||Delta|| + c)``, norms per coordinate: its gradient is that of regressing on ``u - g`` with
    ``g = Delta / (||Delta|| + c)`` (Lu and Song 2410.11081, section 4.1), about as long for every sample."""

    offset: float

    def __call__(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        square = mean_square(delta)
        return square / (square.detach().sqrt() + self.offset)


class LogVariance(nn.Module):
    """A learned ``lv(t, r)``, zero at first: the logarithm of the variance that ``Delta`` is found to have there."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.of_t = TimeEmbedding(width, max_frequency=10.0, zero=True)
        self.of_gap = TimeEmbedding(width, max_frequency=10.0, zero=True)

    def forward(self, t_B: Tensor, r_B: Tensor) -> Tensor:
        return (self.of_t(t_B) + self.of_gap(t_B - r_B)).mean(dim=-1).to(t_B.dtype)


class Likelihood(nn.Module):
    """``e^-lv ||Delta||^2 / D + lv`` (Karras et al. 2312.02696, equation 21): every pair of times comes to count the
    same. A function of the times alone, so the minimiser stays what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = LogVariance()

    def forward(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        lv = self.log_variance(t_B, r_B)
        return mean_square(delta) * torch.exp(-lv) + lv


class Cauchy(nn.Module):
    """``log(e^-lv ||Delta||^2 / D + c) + lv / 2``: as ``Likelihood`` under a Cauchy distribution, which bounds what an
    outlier weighs.

    Decoupled MeanFlow (Lee et al. 2510.24474) prints it with a whole ``lv``. That is ``log(||Delta||^2 / D + c e^lv)``,
    which rises with ``lv`` whatever the deviation: ``lv`` would find no scale and drift down.
    """

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset
        self.log_variance = LogVariance()

    def forward(self, delta: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
        lv = self.log_variance(t_B, r_B)
        return torch.log(mean_square(delta) * torch.exp(-lv) + self.offset) + lv / 2
