"""The one time convention, and the two kinds of model that live in it.

``t = 0`` is data and ``t = 1`` is noise. On the linear path ``x_t = (1 - t) x + t e`` and ``v = dx_t/dt = e - x``.
Sampling runs ``t: 1 -> 0``. A jump goes from ``t`` to ``r <= t``: ``x_r = x_t - (t - r) u(x_t, t, r)`` with ``u`` the
average velocity. Every other convention is converted in a teacher adapter or an exporter, nowhere else.

Shapes: ``x`` is ``[B, *D]`` (images: NCHW in [-1, 1]), times are ``[B]``, labels are ``[B]`` int64 or None.
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.condition import Condition


def expand(t_B: Tensor, x: Tensor) -> Tensor:
    """Reshape per-sample times ``[B]`` so that they broadcast against ``x [B, *D]``."""
    return t_B.reshape(-1, *([1] * (x.ndim - 1)))


@dataclass(frozen=True)
class PathPoint:
    """A point on a probability path: the state ``x_t [B, *D]`` and the conditional velocity ``v [B, *D]`` there."""

    x_t: Tensor
    v: Tensor


@dataclass(frozen=True)
class Interpolant:
    """The path ``x_t = alpha(t) x + sigma(t) e`` between data ``x`` and noise ``e``, with its conversions.

    The four coefficients are functions of a time tensor; every method takes ``t`` of shape ``[B]`` and broadcasts it
    itself. The conversions solve the 2x2 system ``(x_t, v) = [[alpha, sigma], [alpha', sigma']] (x, e)``, which for
    the linear path reads ``xhat = x_t - t v`` and ``ehat = x_t + (1 - t) v``.

    Every such path is the linear one under another clock and another unit of length: the state at ``t`` is
    ``(alpha + sigma)`` times the linear state at the time ``s = sigma / (alpha + sigma)``, where noise and data are in
    the same proportion. ``time_at`` is the inverse of that clock, ``s -> t``. This is how a model of any path is
    exposed in the one convention.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    time_at: Callable[[Tensor], Tensor]

    def sample(self, x: Tensor, e: Tensor, t_B: Tensor) -> PathPoint:
        """The state at ``t`` on the path from ``x`` to ``e`` and its conditional velocity."""
        t = expand(t_B, x)
        return PathPoint(x_t=self.state(x, e, t_B), v=self.d_alpha(t) * x + self.d_sigma(t) * e)

    def state(self, x: Tensor, e: Tensor, t_B: Tensor) -> Tensor:
        """The state at ``t`` alone: ``alpha x + sigma e``."""
        t = expand(t_B, x)
        return self.alpha(t) * x + self.sigma(t) * e

    def data_from_velocity(self, x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """``xhat = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma)``."""
        t = expand(t_B, x_t)
        return (self.d_sigma(t) * x_t - self.sigma(t) * v) / self._determinant(t)

    def noise_from_velocity(self, x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """``ehat = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma)``."""
        t = expand(t_B, x_t)
        return (self.alpha(t) * v - self.d_alpha(t) * x_t) / self._determinant(t)

    def velocity_from_data(self, x_t: Tensor, xhat: Tensor, t_B: Tensor) -> Tensor:
        """The velocity whose data prediction is ``xhat``. Singular where ``sigma(t) = 0`` (``t = 0``)."""
        t = expand(t_B, x_t)
        return (self.d_sigma(t) * x_t - self._determinant(t) * xhat) / self.sigma(t)

    def velocity_from_noise(self, x_t: Tensor, ehat: Tensor, t_B: Tensor) -> Tensor:
        """The velocity whose noise prediction is ``ehat``. Singular where ``alpha(t) = 0`` (``t = 1``)."""
        t = expand(t_B, x_t)
        return (self.d_alpha(t) * x_t + self._determinant(t) * ehat) / self.alpha(t)

    def linear_time(self, t_B: Tensor) -> Tensor:
        """The time ``s [B]`` of the linear path where noise and data are in the proportion they have here at ``t``."""
        sigma = self.sigma(t_B)
        return sigma / (self.alpha(t_B) + sigma)

    def scale(self, t_B: Tensor) -> Tensor:
        """``alpha + sigma [B]``: how much larger this path's state is than the linear one."""
        return self.alpha(t_B) + self.sigma(t_B)

    def velocity_scale(self, t_B: Tensor) -> Tensor:
        """``(alpha sigma' - alpha' sigma) / (alpha + sigma)``, ``[B]``: how much larger an error of the velocity is.

        An error ``dv`` of the linear velocity is one of ``-s dv`` in ``xhat`` and ``(1 - s) dv`` in ``ehat``, hence of
        this times ``dv`` in the velocity of this path: its regression is the linear one with the square as weight.
        """
        return self._determinant(t_B) / self.scale(t_B)

    def velocity_from_linear(self, x_s: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """This path's velocity at ``t``, from the linear state ``x_s`` and velocity ``v`` at ``s = linear_time(t)``."""
        s_B, t = self.linear_time(t_B), expand(t_B, x_s)
        xhat, ehat = LINEAR.data_from_velocity(x_s, v, s_B), LINEAR.noise_from_velocity(x_s, v, s_B)
        return self.d_alpha(t) * xhat + self.d_sigma(t) * ehat

    def linear_from_velocity(self, x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """The linear path's velocity ``ehat - xhat`` from this path's state and velocity at ``t``."""
        return self.noise_from_velocity(x_t, v, t_B) - self.data_from_velocity(x_t, v, t_B)

    def _determinant(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_sigma(t) - self.d_alpha(t) * self.sigma(t)


LINEAR = Interpolant(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=torch.ones_like,
    time_at=lambda s: s,
)
"""The optimal-transport path ``x_t = (1 - t) x + t e`` (Lipman et al. 2210.02747, in reversed time)."""

COSINE = Interpolant(
    alpha=lambda t: torch.cos(math.pi / 2 * t),
    sigma=lambda t: torch.sin(math.pi / 2 * t),
    d_alpha=lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    d_sigma=lambda t: math.pi / 2 * torch.cos(math.pi / 2 * t),
    time_at=lambda s: 2 / math.pi * torch.atan2(s, 1 - s),
)
"""The cosine path (Nichol and Dhariwal 2102.09672; the trigonometric path of 2303.08797): the angle grows evenly."""


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0, first: float = 1e-5) -> Interpolant:
    """The path of the variance-preserving diffusion (Song et al. 2011.13456, equation 33), ``alpha^2 + sigma^2 = 1``.

    ``log alpha_0(t) = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2``. Two repairs at its ends: ``alpha`` is shifted
    and scaled to end at exactly zero (Lin et al. 2305.08891, section 3.1), as the diffusion's own still holds 0.7 % of
    the data at ``t = 1``; and it begins at the diffusion's time ``first``, because at 0 the derivative of ``sigma`` is
    infinite. There ``s`` is about ``sqrt(beta_min first)``, 0.001; ``time_at`` of anything smaller is 0.
    """
    end = math.exp(-(beta_max - beta_min) / 4 - beta_min / 2)
    slope = (beta_max - beta_min) / 4

    def log_alpha(t: Tensor) -> Tensor:
        clock = first + (1 - first) * t
        return -slope * clock**2 - beta_min / 2 * clock

    def alpha(t: Tensor) -> Tensor:
        return (log_alpha(t).exp() - end) / (1 - end)

    def sigma(t: Tensor) -> Tensor:
        below = -log_alpha(t).expm1() / (1 - end)  # 1 - alpha, without its cancellation near data
        return (below * (2 - below)).sqrt()

    def d_alpha(t: Tensor) -> Tensor:
        clock = first + (1 - first) * t
        return -(1 - first) * (2 * slope * clock + beta_min / 2) * log_alpha(t).exp() / (1 - end)

    def time_at(s: Tensor) -> Tensor:
        # With r = sqrt(s^2 + (1-s)^2): 1 - alpha = 1 - (1-s)/r = s^2 / (r (r + 1 - s)).
        r = (s**2 + (1 - s) ** 2).sqrt()
        minus_log_alpha = -torch.log1p(-(1 - end) * s**2 / (r * (r + 1 - s)))
        half = beta_min / 2
        clock = 2 * minus_log_alpha / (half + (half**2 + 4 * slope * minus_log_alpha).sqrt())
        return ((clock - first) / (1 - first)).clamp(0, 1)

    return Interpolant(
        alpha=alpha,
        sigma=sigma,
        d_alpha=d_alpha,
        d_sigma=lambda t: -alpha(t) * d_alpha(t) / sigma(t),
        time_at=time_at,
    )


PATHS: dict[str, Interpolant] = {"linear": LINEAR, "cosine": COSINE, "variance_preserving": variance_preserving()}
"""The paths a config may name."""


@runtime_checkable
class VelocityField(Protocol):
    """A marginal velocity ``v(x, t) = E[dx_t/dt | x_t = x]``: what every teacher is.

    ``nfe`` is what one call costs in network evaluations per sample; samplers add it up per call they make.
    """

    @property
    def nfe(self) -> int: ...

    def __call__(self, x: Tensor, t_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``x [B, *D]``, times ``[B]``, labels ``[B]`` or None -> velocity ``[B, *D]``."""
        ...


@dataclass(frozen=True)
class TimeDomain:
    """The jumps ``t -> r`` a student was trained for. Anything else is refused, never clamped.

    ``any``: every ``0 <= r <= t <= 1``. ``to_data``: jumps that end at data, ``r = 0``. ``grid``: jumps between
    consecutive nodes of ``grid``, a decreasing tuple from 1 to 0.
    """

    kind: Literal["any", "to_data", "grid"]
    grid: tuple[float, ...] = ()

    def check(self, t: float, r: float) -> None:
        """Raise ``ValueError`` unless the jump ``t -> r`` belongs to the domain (the identity ``t = r`` does)."""
        if not 0 <= r <= t <= 1:
            raise ValueError(f"a jump goes from t to r with 0 <= r <= t <= 1, got t = {t:g}, r = {r:g}")
        if t == r or self.kind == "any":
            return
        if self.kind == "to_data":
            if r != 0:
                raise ValueError(f"this student only jumps to data (r = 0), got t = {t:g}, r = {r:g}")
            return
        tolerance = 1e-6  # times travel as float32
        # The first node at or below t: grids have thousands of them, and every row of a batch asks.
        i = bisect_left(self.grid, -t - tolerance, key=operator.neg)
        if i + 1 < len(self.grid) and abs(self.grid[i] - t) < tolerance and abs(self.grid[i + 1] - r) < tolerance:
            return
        nodes = ", ".join(f"{node:g}" for node in self.grid)
        raise ValueError(f"this student only jumps between consecutive nodes of {nodes}; got t = {t:g}, r = {r:g}")


ANY_JUMP = TimeDomain("any")
JUMPS_TO_DATA = TimeDomain("to_data")


@runtime_checkable
class FlowMap(Protocol):
    """A learned jump ``x_t -> x_r``: what every student is. ``map(x, t, t) = x``.

    ``domain`` says which jumps it was trained for; calling it elsewhere is a ``ValueError``. ``nfe`` is what one call
    costs in network evaluations per sample.
    """

    @property
    def domain(self) -> TimeDomain: ...

    @property
    def nfe(self) -> int: ...

    def __call__(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor:
        """``x [B, *D]``, times ``t, r [B]``, labels ``[B]`` or None -> state at ``r``, ``[B, *D]``."""
        ...


@runtime_checkable
class UncheckedMap(Protocol):
    """A flow map that also jumps without asking whether the times of this one batch are in its domain."""

    def jump(self, x: Tensor, t_B: Tensor, r_B: Tensor, label_B: Condition | None = None) -> Tensor: ...


def unchecked(flow_map: FlowMap) -> Callable[..., Tensor]:
    """A flow map for jumps that are known to be in its domain: where it can it does not look at their times again,
    which would read those of every call back from the device."""
    return flow_map.jump if isinstance(flow_map, UncheckedMap) else flow_map


def check_jumps(domain: TimeDomain, t_B: Tensor, r_B: Tensor) -> None:
    """Check every distinct pair of a batch of jumps against a domain (one host synchronisation)."""
    for t, r in {(float(t), float(r)) for t, r in zip(t_B.tolist(), r_B.tolist(), strict=True)}:
        domain.check(t, r)


def uniform_grid(steps: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decreasing times ``[steps + 1]`` from 1 to 0 in equal steps.

    Built from the integers, so that a grid of ``2 N`` steps holds every node of the grid of ``N`` steps exactly.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}")
    return torch.arange(steps, -1, -1, dtype=torch.float64).div(steps).to(dtype)
