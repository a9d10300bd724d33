"""From what a model says in a convention of its own to the velocity in the one convention.

At the linear state ``x_t`` and time ``t`` the model's path has the state ``(alpha + sigma) x_t`` at its own time
``tau``, where noise and data are in the same proportion. From what the model says there follow data and noise; the
velocity is their difference. (Diff2Flow, 2506.02221, does this for the variances of a diffusion.)
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.conventions import BetaSchedule, ConventionConfig
from fewstep.flow import LINEAR, PATHS, Interpolant, expand

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(state [B, *D], time [B]) -> prediction [B, *D]``, all in the model's own convention."""


def canonical_velocity(said: ConventionConfig, predict: Predict, x: Tensor, t_B: Tensor) -> Tensor:
    """The velocity ``e - x`` at the linear state ``x [B, *D]`` and time ``t [B]`` of a model read as ``said``.

    Beyond the latest time that it is asked for, the state is taken for noise alone, made as large as it would have been
    then, and what the model says of the data then is kept (``x`` at ``t = 1`` enters EDM's path as ``80 x`` at
    ``sigma = 80``). Before the earliest its velocity is kept.
    """
    path = path_of(said)
    first, last = bounds(said)
    at_B = t_B.clamp(first, last)
    then = x * expand(last / t_B.clamp(min=last), x).to(x)
    tau_B = path.time_at(at_B)
    state = expand(path.scale(tau_B), x).to(x) * then
    clock = tau_B if said.noise_at == 1 else 1 - tau_B
    found = predict(state, said.time_scale * clock).to(x)
    v = _velocity(said, path, found, state, then, tau_B, at_B)
    if last == 1:
        return v
    # The data prediction of then, which is then - at v, is to be that of x at t.
    late = (x - then + expand(at_B, x).to(x) * v) / expand(t_B.clamp(min=last), x).to(x)
    return torch.where(expand(t_B > last, x), late, v)


def _velocity(
    said: ConventionConfig, path: Interpolant, found: Tensor, state: Tensor, x: Tensor, tau_B: Tensor, t_B: Tensor
) -> Tensor:
    """The linear velocity at ``x`` and ``t``, of which ``state`` and ``tau`` are the path's own."""
    if said.prediction == "velocity":
        # Its velocity is the change of its state towards noise, per unit of a clock that runs to 1 either way.
        return path.linear_from_velocity(state, found if said.velocity_to == "noise" else -found, tau_B)
    if said.prediction == "data":
        return LINEAR.velocity_from_data(x, found, t_B)
    if said.prediction == "noise":
        return LINEAR.velocity_from_noise(x, found, t_B)
    alpha, sigma = expand(path.alpha(tau_B), x).to(x), expand(path.sigma(tau_B), x).to(x)
    if said.prediction == "score":
        return LINEAR.velocity_from_noise(x, -sigma * found, t_B)
    # v = alpha e - sigma x, solved with the state alpha x + sigma e.
    return ((sigma + alpha) * found + (sigma - alpha) * state) / (alpha.square() + sigma.square())


def path_of(said: ConventionConfig) -> Interpolant:
    """The path of a convention."""
    if said.path == "variance_exploding":
        return VARIANCE_EXPLODING
    if said.betas is None:
        return PATHS[said.path]
    return continuous_path(said.betas) if said.betas.kind == "continuous" else diffusion_path(said.betas)


def bounds(said: ConventionConfig) -> tuple[float, float]:
    """The earliest and the latest linear time at which a model is asked: those said, within what its path has."""
    if said.betas is None:
        return said.earliest, said.latest
    if said.betas.kind == "continuous":
        ends = continuous_path(said.betas).linear_time(torch.tensor([FIRST, 1.0], dtype=torch.float64)).tolist()
    else:
        ends = noise_shares(said.betas)[[0, -1]].tolist()
    return max(said.earliest, ends[0]), min(said.latest, ends[1])


VARIANCE_EXPLODING = Interpolant(
    alpha=torch.ones_like,
    sigma=lambda t: t,
    d_alpha=torch.zeros_like,
    d_sigma=torch.ones_like,
    time_at=lambda s: s / (1 - s),
)
"""``x + sigma e``, whose time is ``sigma`` itself (Karras et al. 2206.00364). It has no end."""


FIRST = 1e-5
"""The time at which a continuous diffusion begins: at 0 its noise changes infinitely fast."""


@lru_cache
def continuous_path(betas: BetaSchedule) -> Interpolant:
    """The variance-preserving path of ``log alpha(t) = -(end - start) t^2 / 4 - start t / 2``. It ends before all is
    noise: at 0.6 % of the data for 0.1 and 20."""
    slope, half = (betas.end - betas.start) / 4, betas.start / 2

    def log_alpha(t: Tensor) -> Tensor:
        return -slope * t.square() - half * t

    def sigma(t: Tensor) -> Tensor:
        return (-torch.expm1(2 * log_alpha(t))).sqrt()

    def d_alpha(t: Tensor) -> Tensor:
        return -(2 * slope * t + half) * log_alpha(t).exp()

    def time_at(s: Tensor) -> Tensor:
        # sigma / alpha = s / (1 - s), hence -2 log alpha = log(1 + (s / (1 - s))^2).
        minus = torch.log1p((s / (1 - s)).square()) / 2
        return 2 * minus / (half + (half**2 + 4 * slope * minus).sqrt())

    return Interpolant(
        alpha=lambda t: log_alpha(t).exp(),
        sigma=sigma,
        d_alpha=d_alpha,
        d_sigma=lambda t: -log_alpha(t).exp() * d_alpha(t) / sigma(t),
        time_at=time_at,
    )


@lru_cache
def noise_shares(betas: BetaSchedule) -> Tensor:
    """``s_k = sigma_k / (alpha_k + sigma_k)``, ``[steps]`` float64: the linear times of a diffusion's states."""
    if betas.kind == "squared_cosine":
        at = torch.arange(betas.steps + 1, dtype=torch.float64) / betas.steps
        bar = torch.cos((at + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    elif betas.kind == "scaled_linear":
        beta = torch.linspace(betas.start**0.5, betas.end**0.5, betas.steps, dtype=torch.float64).square()
    else:
        beta = torch.linspace(betas.start, betas.end, betas.steps, dtype=torch.float64)
    alpha = torch.log1p(-beta).cumsum(0).div(2).exp()
    if betas.zero_terminal:  # shifted to end at zero, scaled to begin where it began (2305.08891, algorithm 1)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    sigma = (1 - alpha.square()).sqrt()
    return sigma / (alpha + sigma)


@lru_cache
def diffusion_path(betas: BetaSchedule) -> Interpolant:
    """The variance-preserving path through the states of a diffusion; time ``k / (steps - 1)`` is its step ``k``.

    Between steps the linear time changes evenly.
    """
    shares, last = noise_shares(betas), betas.steps - 1

    def share(tau: Tensor) -> Tensor:
        table = shares.to(tau)
        k = (tau.detach() * last).floor().long().clamp(0, last - 1)
        return table[k] + (table[k + 1] - table[k]) * (tau * last - k)

    def slope(tau: Tensor) -> Tensor:
        table = shares.to(tau)
        k = (tau.detach() * last).floor().long().clamp(0, last - 1)
        return (table[k + 1] - table[k]) * last

    def time_at(s: Tensor) -> Tensor:
        table = shares.to(s)
        k = torch.searchsorted(table, s.detach().contiguous(), right=True).sub(1).clamp(0, last - 1)
        return ((k + (s - table[k]) / (table[k + 1] - table[k])) / last).clamp(0, 1)

    def size(tau: Tensor) -> Tensor:
        s = share(tau)
        return (s.square() + (1 - s).square()).sqrt()

    return Interpolant(
        alpha=lambda tau: (1 - share(tau)) / size(tau),
        sigma=lambda tau: share(tau) / size(tau),
        d_alpha=lambda tau: -share(tau) / size(tau) ** 3 * slope(tau),
        d_sigma=lambda tau: (1 - share(tau)) / size(tau) ** 3 * slope(tau),
        time_at=time_at,
    )
