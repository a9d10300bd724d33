"""A second implementation of everything known in closed form, in numpy float64, written from other formulas.

fewstep's analytic teachers use posterior weights, log tails and gains without cancellation. Here the same quantities
come from scores, quadrature, matrix solves, plain distribution functions and differences, so that one slip cannot hide
in both. Convention: t = 0 data, t = 1 noise, ``x_t = (1-t) x + t e``, ``v = E[e - x | x_t]``, jumps t -> r.

Times are scalars; x is ``[N]`` in one dimension and ``[N, D]`` else.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------ Gaussian N(m, s^2), scalar


def gaussian_sd(t: float, s: float) -> float:
    return math.hypot((1 - t) * s, t)


def gaussian_velocity(x: Array, t: float, m: float, s: float) -> Array:
    """``v = mu_t' + (sd_t' / sd_t) (x - mu_t)`` (the quotient is half the logarithmic derivative of the variance)."""
    d_variance = -2 * (1 - t) * s**2 + 2 * t
    return -m + 0.5 * d_variance / gaussian_sd(t, s) ** 2 * (x - (1 - t) * m)


def gaussian_map(x: Array, t: float, r: float, m: float, s: float) -> Array:
    """The point as many standard deviations from the mean at r as x is at t."""
    return (1 - r) * m + gaussian_sd(r, s) * (x - (1 - t) * m) / gaussian_sd(t, s)


def gaussian_average_velocity(x: Array, t: float, r: float, m: float, s: float) -> Array:
    """Displacement over time; only for r < t, with the rounding of a difference."""
    return (x - gaussian_map(x, t, r, m, s)) / (t - r)


def gaussian_velocity_full(x: Array, t: float, mean: Array, cov: Array) -> Array:
    """``v = E[e - x] + Cov(e - x, x_t) Cov(x_t)^-1 (x_t - mu_t)``: linear regression, exact for Gaussians. [N, D]."""
    identity = np.eye(len(mean))
    cross = t * identity - (1 - t) * cov
    marginal = t**2 * identity + (1 - t) ** 2 * cov
    return -mean + (cross @ np.linalg.solve(marginal, (x - (1 - t) * mean).T)).T


# ---------------------------------------------------------------------------------- mixture sum_k w_k N(m_k, s_k^2 I)


def mixture_velocity(x: Array, t: float, w: Array, m: Array, s: Array) -> Array:
    """``v = -(x + t grad log p_t) / (1 - t)`` for t < 1 from the score, and ``x - E[data]`` at t = 1.

    x [N, D], w [K], m [K, D], s [K]. The noise prediction is minus t times the score.
    """
    if t == 1:
        return x - w @ m
    density = np.zeros(len(x))
    gradient = np.zeros_like(x)
    for w_k, m_k, s_k in zip(w, m, s, strict=True):
        variance = gaussian_sd(t, s_k) ** 2
        offset = x - (1 - t) * m_k
        p_k = w_k * np.exp(-0.5 * (offset**2).sum(1) / variance) / (2 * np.pi * variance) ** (x.shape[1] / 2)
        density += p_k
        gradient -= p_k[:, None] * offset / variance
    return -(x + t * gradient / density[:, None]) / (1 - t)


def mixture_velocity_quadrature(x: Array, t: float, w: Array, m: Array, s: Array) -> Array:
    """The same in one dimension by Bayes' rule on a grid over the data: ``E[(x_t - data) / t | x_t]``, 0 < t. x [N].

    The trapezoid rule converges geometrically for Gaussian integrands.
    """
    data = np.linspace((m - 14 * s).min(), (m + 14 * s).max(), 8001)
    prior = sum(w_k / s_k * np.exp(-0.5 * ((data - m_k) / s_k) ** 2) for w_k, m_k, s_k in zip(w, m, s, strict=True))
    posterior = prior * np.exp(-0.5 * ((x[:, None] - (1 - t) * data) / t) ** 2)
    return (posterior * (x[:, None] - data)).sum(1) / posterior.sum(1) / t


def mixture_map(x: Array, t: float, r: float, w: Array, m: Array, s: Array) -> Array:
    """``F_r^-1(F_t(x))`` in one dimension by bisection on a wide bracket, in the lighter tail of each point. x [N]."""

    def tail(y: float, time: float, side: int) -> float:
        z = (side * (y - (1 - time) * m_k) / gaussian_sd(time, s_k) for m_k, s_k in zip(m, s, strict=True))
        return sum(w_k * 0.5 * math.erfc(-z_k / math.sqrt(2)) for w_k, z_k in zip(w, z, strict=True))

    def one(y: float) -> float:
        side = 1 if tail(y, t, 1) < 0.5 else -1
        target = tail(y, t, side)
        low, high = -50.0, 50.0
        for _ in range(110):
            middle = 0.5 * (low + high)
            if side * (tail(middle, r, side) - target) > 0:
                high = middle
            else:
                low = middle
        return 0.5 * (low + high)

    return np.array([one(float(y)) for y in x])


# ------------------------------------------------------------------------------------------------------ integrators


def rk4(velocity: Callable[[Array, float], Array], x: Array, t: float, r: float, steps: int) -> Array:
    """The classical fourth-order Runge-Kutta method for ``dx/dt = v(x, t)`` from t to r in equal steps."""
    h = (r - t) / steps
    for n in range(steps):
        time = t + n * h
        k1 = velocity(x, time)
        k2 = velocity(x + h / 2 * k1, time + h / 2)
        k3 = velocity(x + h / 2 * k2, time + h / 2)
        k4 = velocity(x + h * k3, time + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def euler_gain(steps: int, s: float) -> float:
    """What N Euler steps on the uniform grid do to a standard deviation of noise, for data of std s.

    ``P_N = prod (1 + (t' - t) a(t))`` with the slope of the velocity ``a(t) = (t - (1-t) s^2) / sd_t^2``.
    """
    gain = 1.0
    for n in range(steps, 0, -1):
        t = n / steps
        gain *= 1 - (t - (1 - t) * s**2) / gaussian_sd(t, s) ** 2 / steps
    return gain


def euler_frechet(steps: int, s: float) -> float:
    """Frechet distance per dimension between data of std s and its N-step Euler samples: ``(s - P_N)^2``."""
    return (s - euler_gain(steps, s)) ** 2
