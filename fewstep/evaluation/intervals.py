"""How far a distance may be off: standard errors by the delta method, and of differences on shared seeds.

A statistic of n samples moves by ``h(y_i) / n`` when sample ``i`` gets a little more weight; ``h`` is its influence,
and ``std(h) / sqrt(n)`` its standard error (von Mises 1947). One pass and no resampling: a bootstrap of the Fréchet
distance would add its bias a second time. Everything is conditional on the reference, whose own error all rows share.
Influences are float64 ``[M]`` with mean 0. Centre an interval of a Fréchet distance on its half-split estimate
(``frechet.half_split``): around the plain distance, which is biased by several standard errors, it covers nothing.

Shapes: N reference rows, M generated rows, D dimensions, R rank of the reference.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features
from fewstep.evaluation.frechet import Moments, congruence
from fewstep.evaluation.kernel import KernelMeans, kernel_means

_BLOCK = 2048  # rows converted to float64 at a time
_HEAVY_SHARE = 0.01
_MOST = 0.5


def frechet_influence(ref: Moments, gen: Moments, features_MD: Tensor, gram: Tensor | None = None) -> Tensor:
    """The influence ``[M]`` of generated samples on their Fréchet distance to ``ref``; ``gen`` are their moments.

    ``h(y) = 2 (m2 - m1).(y - m2) + (y - m2)' (I - T) (y - m2)`` less its mean, where ``S1 = B B'``, ``M = B' S2 B`` and
    ``T = B M^(-1/2) B'``: half of ``T`` is the derivative of ``tr (S1 S2)^(1/2)`` by ``S2``. ``ValueError`` unless
    there are more samples than features. ``gram`` is ``M`` where it is known already.
    """
    check_features(features_MD)
    dim = len(ref.mean)
    if features_MD.shape[1] != dim or len(gen.mean) != dim:
        raise ValueError(f"features of different dimensions: {dim}, {len(gen.mean)} and {features_MD.shape[1]}")
    if len(features_MD) != gen.n:
        raise ValueError(f"moments of {gen.n} samples and the features of {len(features_MD)}")
    if gen.n <= dim:
        raise ValueError(f"{gen.n} samples of {dim} features: a standard error needs more samples than features")
    values_R, vectors_RR = torch.linalg.eigh(congruence(ref.factor, gen.cov) if gram is None else gram)
    # Where the samples do not vary at all, neither does this part of their influence: the pseudo-inverse serves.
    floor = len(values_R) * torch.finfo(values_R.dtype).eps * float(values_R.amax()) if len(values_R) else 0.0
    kept = values_R > floor
    half_DR = (ref.factor @ vectors_RR[:, kept]) * values_R[kept] ** -0.25  # T = half half'
    shift = 2 * (gen.mean - ref.mean)
    parts = []
    for block in features_MD.split(_BLOCK):
        off = block.double() - gen.mean
        parts.append(off @ shift + off.square().sum(1) - (off @ half_DR).square().sum(1))
    influence_M = torch.cat(parts)
    return influence_M - influence_M.mean()


def kernel_influence(ref_ND: Tensor, gen_MD: Tensor) -> Tensor:
    """The influence ``[M]`` of generated samples on their kernel distance: ``2 (mean_j k(y, y_j) - mean_i k(x_i, y))``
    over other samples ``y_j``, less its mean.

    Where the two distributions coincide it vanishes and what is left is of second order: no interval then.
    """
    return kernel_influence_from(kernel_means(ref_ND, gen_MD))


def kernel_influence_from(means: KernelMeans) -> Tensor:
    """The same from the means that the distance itself is made of: both from one pass over the features."""
    influence_M = 2 * (means.gen_M - means.cross_M)
    return influence_M - influence_M.mean()


def standard_error(influence_M: Tensor) -> float:
    """``std(h) / sqrt(n)``, ``ddof = 1``."""
    if influence_M.ndim != 1 or len(influence_M) < 2:
        raise ValueError(f"influences are [M] with M >= 2, got {list(influence_M.shape)}")
    return float(influence_M.double().std()) / math.sqrt(len(influence_M))


def interval(value: float, influence_M: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The normal interval around ``value`` that covers the truth with probability ``level``."""
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    reach = NormalDist().inv_cdf((1 + level) / 2) * standard_error(influence_M)
    return value - reach, value + reach


def paired(influence_a: Tensor, influence_b: Tensor) -> float:
    """The standard error of a difference between two rows of shared seeds: sample ``i`` of both has the same noise."""
    if influence_a.shape != influence_b.shape:
        raise ValueError(f"paired by index: {list(influence_a.shape)} and {list(influence_b.shape)} influences")
    return standard_error(influence_a - influence_b)


def heavy(influence_M: Tensor) -> bool:
    """Whether the 1 % largest influences carry more than half of their variance: a standard error is then itself
    uncertain. They carry 8 % where influences are normal."""
    square = (influence_M.double() - influence_M.double().mean()).square()
    top = square.topk(max(1, math.ceil(_HEAVY_SHARE * len(square)))).values
    return float(top.sum()) > _MOST * float(square.sum())
