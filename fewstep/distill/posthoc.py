"""Averages that were not tracked, rebuilt from snapshots of some that were (Karras et al. 2312.02696, section 3.2).

A power-function average at a step weighs the weights of all steps before by its profile. Profiles that were kept, in
linear combination, come close to others; the same combination of the snapshots is then the average of that profile.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.checkpoint import Tensors
from fewstep.distill.ema import power_exponent

Profile = tuple[int, float]
"""``(step, relative_std)`` of a power-function average."""

MAX_PROFILE_ERROR = 0.05
"""The worst fit that passes for a reconstruction, unless the caller says otherwise."""


def profile_inner_product(
    step_a: ArrayLike, gamma_a: ArrayLike, step_b: ArrayLike, gamma_b: ArrayLike
) -> NDArray[np.float64]:
    """``int p_a p_b`` of profiles ``p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`` on ``[0, t]`` (2312.02696,
    appendix C), which is ``(a + 1)(b + 1) / (a + b + 1) (m / t_a)^(a + 1) (m / t_b)^(b + 1) / m`` for exponents
    ``a, b`` and ``m = min(t_a, t_b)``. Arguments broadcast.
    """
    t_a, a, t_b, b = (np.asarray(each, dtype=np.float64) for each in (step_a, gamma_a, step_b, gamma_b))
    m = np.minimum(t_a, t_b)
    # Ratios of steps underflow harmlessly; powers of steps would overflow.
    return (a + 1) * (b + 1) / (a + b + 1) * (m / t_a) ** (a + 1) * (m / t_b) ** (b + 1) / m


def reconstruction_weights(
    snapshots: Sequence[Profile], target: Profile, *, max_profile_error: float = MAX_PROFILE_ERROR
) -> NDArray[np.float64]:
    """Weights ``w`` of the snapshots, in their order: ``argmin int (sum_i w_i p_i - p)^2`` with ``sum_i w_i = 1``.

    Least squares as in 2312.02696, algorithm 3. The constraint is added here: every profile has integral one, and
    what their combination lacks of it multiplies the weights themselves instead of their movement, which is smaller
    (measured on a network under Adam: a tenth of the error).

    Raises ``ValueError`` for a step after the last snapshot, and where ``profile_error`` exceeds ``max_profile_error``:
    for widths far from those tracked, steps between snapshots, too few snapshots.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to rebuild an average from")
    if min(step for step, _ in (*snapshots, target)) < 1:
        raise ValueError("averages exist from step 1 on")
    step, width = target
    last = max(step for step, _ in snapshots)
    if step > last:
        raise ValueError(f"an average at step {step} cannot be rebuilt: the last snapshot is of step {last}")
    gram, cross, scale = _normal_equations(snapshots, target)
    # Lagrange's equations for unit-norm profiles. The Gram matrix is ill-conditioned, as neighbours look alike (1e3 for
    # snapshots of two widths at 20 steps, 1e6 at 100, 2e7 at 200), and singular where a profile is given twice. Solved
    # by singular values the weights stay small all the same, and with them what they make of rounding in the snapshots.
    system = np.block([[gram, scale[:, None]], [scale[None, :], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(cross, 1.0), rcond=None)[0][:-1]
    weights = solution * scale
    error = profile_error(snapshots, weights, target)
    if error > max_profile_error:
        raise ValueError(
            f"these snapshots give no average of relative_std {width:g} at step {step}: the best combination is off by "
            f"{error:.1%} of the profile, {max_profile_error:.1%} allowed (steps that have snapshots and widths near "
            "those tracked fit best)"
        )
    return weights


def profile_error(snapshots: Sequence[Profile], weights: ArrayLike, target: Profile) -> float:
    """``|sum_i w_i p_i - p| / |p|`` in ``L2``, not to be trusted below 1e-7.

    The error of the rebuilt weights is this combination of all steps' weights, so about this share of how far they
    moved within the width of the profile.
    """
    gram, cross, scale = _normal_equations(snapshots, target)
    x = np.asarray(weights, dtype=np.float64) / scale
    # A difference of numbers near one: rounding of 1e-16 shows as 1e-8, times what the weights exceed one by.
    return math.sqrt(max(0.0, float(x @ gram @ x - 2 * x @ cross + 1)))


def reconstruct(snapshots: Iterable[Tensors], weights: Iterable[float]) -> Tensors:
    """``sum_i w_i snapshot_i`` in float64, in the type of the snapshots; one snapshot is held at a time.

    Tensors of integers (counters) are those of the last one.
    """
    total: Tensors = {}
    like: Tensors = {}
    for tensors, weight in zip(snapshots, weights, strict=True):
        if like and tensors.keys() != like.keys():
            raise ValueError(f"snapshots differ in {', '.join(sorted(tensors.keys() ^ like.keys()))}")
        like = tensors
        for name, value in tensors.items():
            if not value.is_floating_point():
                total[name] = value
            elif name in total:
                total[name] += float(weight) * value.double()
            else:
                total[name] = float(weight) * value.double()
    return {name: value.to(like[name].dtype) for name, value in total.items()}


def _normal_equations(
    snapshots: Sequence[Profile], target: Profile
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Inner products among the snapshots' profiles ``[N, N]`` and with the target's ``[N]``, all of unit norm, and the
    factors ``|p| / |p_i|`` ``[N]`` that turn their coefficients into weights of the profiles themselves."""
    steps = np.array([step for step, _ in snapshots], dtype=np.float64)
    gammas = np.array([power_exponent(width) for _, width in snapshots])
    step, gamma = target[0], power_exponent(target[1])
    gram = profile_inner_product(steps[:, None], gammas[:, None], steps, gammas)
    cross = profile_inner_product(steps, gammas, step, gamma)
    norms = np.sqrt(np.diag(gram))
    norm = math.sqrt(float(profile_inner_product(step, gamma, step, gamma)))
    return gram / np.outer(norms, norms), cross / (norms * norm), norm / norms
