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
from fewstep.uploads import on_device

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


def truncated_student(degrees: float, scale: float, sigma_min: float, sigma_max: float) -> Times:
    """``ln sigma / scale`` from Student's t distribution, given ``sigma_min <= sigma <= sigma_max`` (Lee et al.
    2410.14895). With few ``degrees`` of freedom that is near to even in ``ln |ln sigma|``: heavy tails.

    By ``ln sigma = scale sqrt(degrees) sinh y`` the density of ``y`` is ``cosh(y)^-degrees``, so flat that a table of
    its integral gives the distribution to 1e-7."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels run from sigma_min to a larger sigma_max, got {sigma_min:g} and {sigma_max:g}")
    width = scale * math.sqrt(degrees)
    low, high = (math.asinh(math.log(sigma) / width) for sigma in (sigma_min, sigma_max))
    return partial(_truncated_student, width=width, law=(degrees, low, high))


def _student_table(degrees: float, low: float, high: float) -> Tensor:
    """``y`` from ``low`` to ``high`` and the distribution function there, ``[2, 4097]`` float64."""
    y = torch.linspace(low, high, 4097, dtype=torch.float64)
    # cosh(y)^-degrees without overflow.
    mass = torch.exp(-degrees * (y.abs() + torch.log1p(torch.exp(-2 * y.abs()))))
    total = torch.cumulative_trapezoid(mass, y)
    return torch.stack((y, torch.cat((torch.zeros(1, dtype=torch.float64), total / total[-1]))))


def _truncated_student(u: Tensor, width: float, law: tuple[float, float, float]) -> Tensor:
    y, table = on_device(_student_table, law, u.device)
    k = torch.searchsorted(table, u, right=True).clamp(1, len(table) - 1) - 1
    share = (u - table[k]) / (table[k + 1] - table[k])
    return torch.sigmoid(width * torch.sinh(torch.lerp(y[k], y[k + 1], share)))


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


Pairs = Callable[[Key, Tensor, Tensor], TimePairs]
"""``(key, index [B], jump [B])`` -> a pair for each sample, with ``r = t`` where ``jump`` is false."""


def sorted_pairs(first: Times, second: Times | None = None) -> Pairs:
    """Two draws in order: ``t`` the larger and ``r`` the smaller (Geng et al. 2505.13447, section 4.3). Twice uniform,
    they are uniform on the triangle."""
    return partial(_sorted_pairs, first=first, second=second or first)


def _sorted_pairs(key: Key, index_B: Tensor, jump_B: Tensor, first: Times, second: Times) -> TimePairs:
    a = sample_times(first, key, "time", index_B)
    b = sample_times(second, key, "second_time", index_B)
    t = torch.maximum(a, b)
    return TimePairs(t, torch.where(jump_B, torch.minimum(a, b), t))


def clipped_pairs(start: Times, end: Times) -> Pairs:
    """``t`` from one distribution and ``r`` from another, cut off at ``t``. Times without a jump keep the distribution
    of ``t``, as they do not where two draws are sorted first."""
    return partial(_clipped_pairs, start=start, end=end)


def _clipped_pairs(key: Key, index_B: Tensor, jump_B: Tensor, start: Times, end: Times) -> TimePairs:
    t = sample_times(start, key, "time", index_B)
    r = sample_times(end, key, "second_time", index_B)
    return TimePairs(t, torch.where(jump_B, torch.minimum(t, r), t))


def gap_pairs(gap: Times, end: Times) -> Pairs:
    """``t - r`` from one distribution; then ``r`` from another, given that ``r <= 1 - (t - r)`` (Zhou et al.
    2511.19797, appendix): exact, no draw is cut off or rejected."""
    return partial(_gap_pairs, gap=gap, end=end)


def _gap_pairs(key: Key, index_B: Tensor, jump_B: Tensor, gap: Times, end: Times) -> TimePairs:
    length = gap(key.uniform("time", index_B))
    room = 1 - length
    r = end(key.uniform("second_time", index_B) * distribution(end, room))
    r = torch.minimum(r, room).clamp(min=0)  # by rounding alone it would leave [0, room]
    t = (r + length).clamp(max=1).float()
    return TimePairs(t, torch.where(jump_B, torch.minimum(r.float(), t), t))


def dyadic_pairs(levels: int) -> Pairs:
    """Steps of length ``d = 1, 1/2, ..., 2^-(levels - 1)``, equally often, from a node of their own grid: ``t`` a
    positive multiple of ``d`` and ``r = t - d`` (Frans et al. 2410.12557). Where nothing jumps ``t`` is uniform."""
    return partial(_dyadic_pairs, levels=levels)


def _dyadic_pairs(key: Key, index_B: Tensor, jump_B: Tensor, levels: int) -> TimePairs:
    count = 2.0 ** (key.uniform("level", index_B) * levels).floor()
    u = key.uniform("time", index_B)
    t = ((u * count).floor() + 1) / count
    return TimePairs(torch.where(jump_B, t, u).float(), torch.where(jump_B, t - 1 / count, u).float())


def with_diagonal(pairs: Pairs, diagonal: Times) -> Pairs:
    """The same pairs, and times of a distribution of their own where nothing jumps."""
    return partial(_with_diagonal, pairs=pairs, diagonal=diagonal)


def _with_diagonal(key: Key, index_B: Tensor, jump_B: Tensor, pairs: Pairs, diagonal: Times) -> TimePairs:
    jumps = pairs(key, index_B, jump_B)
    t = sample_times(diagonal, key, "diagonal_time", index_B)
    return TimePairs(torch.where(jump_B, jumps.t, t), torch.where(jump_B, jumps.r, t))


def distribution(times: Times, t_B: Tensor) -> Tensor:
    """The distribution function at ``t [B]``, float64. To 1e-12 relative to its value, down to 1e-300: in a tail, what
    is drawn below ``t`` still has its digits.

    In closed form for uniform and logit-normal times, shifted or not; any other distribution is known by its inverse,
    and its logarithm is found by halving, in some sixty times as many operations.
    """
    if times is uniform:
        return t_B
    if isinstance(times, partial) and times.func is _logit_normal:
        mean, std = times.keywords["mean"], times.keywords["std"]
        return torch.special.log_ndtr((torch.logit(t_B) - mean) / std).exp()
    if isinstance(times, partial) and times.func is _shifted:
        shift = times.keywords["shift"]
        return distribution(times.keywords["times"], t_B / (shift - (shift - 1) * t_B))
    return _by_halving(times, t_B)


def _by_halving(times: Times, t_B: Tensor) -> Tensor:
    low, high = torch.full_like(t_B, -690.0), torch.zeros_like(t_B)
    for _ in range(60):
        middle = (low + high) / 2
        below = times(middle.exp()) <= t_B
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).exp()


def jump_rows(index_B: Tensor, fraction: float) -> Tensor:
    """Which samples of a batch make a jump (``r < t``), as a bool mask ``[B]``; the others stay on the diagonal.

    Row ``j`` of the global batch jumps where ``floor((j + 1) fraction)`` exceeds ``floor(j fraction)``: exactly the
    wanted share, spread evenly, a function of the sample index alone, hence the same for any number of processes.
    """
    j = index_B.to(torch.float64)
    # The small offset keeps products such as 3 * (1 / 3) on the right side of their integer.
    return torch.floor((j + 1) * fraction + 1e-9) > torch.floor(j * fraction + 1e-9)


def jumps_last(index_B: Tensor, fraction: float, first: int | None = None) -> tuple[Tensor, int]:
    """An order of the rows of a batch, ``[B]``, in which those that ``jump_rows`` picks come last and both parts keep
    theirs; and how many rows stay.

    ``first`` is the first of ``index_B`` where that counts up by one. Then the number is known without a look at the
    device; otherwise (None) the host waits for it.
    """
    jump = jump_rows(index_B, fraction)
    order = torch.argsort(jump.to(torch.int8), stable=True)
    jumping = int(jump.sum()) if first is None else _floor(first + len(index_B), fraction) - _floor(first, fraction)
    return order, len(order) - jumping


def _floor(j: int, fraction: float) -> int:
    """Jumps among the first ``j`` rows: the same numbers as in ``jump_rows``, which all but this difference cancel."""
    return math.floor(j * fraction + 1e-9)
