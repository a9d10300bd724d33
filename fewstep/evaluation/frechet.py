"""The Fréchet distance between Gaussians fitted to two sets of features (FID, where the features are Inception's).

``FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`` (Dowson and Landau 1982; Heusel et al. 1706.08500), with
``ddof = 1`` covariances, no ``eps I``, everything in float64. Shapes: N samples, D dimensions, R rank.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features

_BLOCK = 2048  # rows converted to float64 at a time


@dataclass(frozen=True)
class Moments:
    """Mean ``[D]`` and covariance ``[D, D]`` (``ddof = 1``) of ``n`` samples, float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @cached_property
    def factor(self) -> Tensor:
        """``B [D, R]`` with ``B B' = cov`` and ``R`` its numerical rank. Computed once: keep a reference's moments."""
        cov = (self.cov + self.cov.T) / 2
        negligible = len(cov) * torch.finfo(cov.dtype).eps * float(cov.diagonal().max())
        lower, info = torch.linalg.cholesky_ex(cov)
        # A pivot of the size of a rounding error means a singular matrix that rounding made positive.
        if int(info) == 0 and float(lower.diagonal().min()) ** 2 > negligible:
            return lower
        # Constant or dependent features, or too few samples: keep the directions in which there is variance.
        values, vectors = torch.linalg.eigh(cov)
        kept = values > negligible
        return vectors[:, kept] * values[kept].sqrt()


def moments(features_ND: Tensor) -> Moments:
    """Moments of features ``[N, D]``, ``N >= 2``. Two passes, so a large mean costs no digits."""
    check_features(features_ND)
    n = len(features_ND)
    mean = features_ND.mean(0, dtype=torch.float64)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for block in features_ND.split(_BLOCK):
        centred = block.double() - mean
        scatter.addmm_(centred.T, centred)
    return Moments(mean, scatter / (n - 1), n)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub and LeVeque 1979)."""
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = a.cov * (a.n - 1) + b.cov * (b.n - 1) + torch.outer(shift, shift) * (a.n * b.n / n)
    return Moments(a.mean + shift * (b.n / n), scatter / (n - 1), n)


def frechet_distance(ref: Moments, gen: Moments) -> float:
    """The Fréchet distance of two Gaussians, never below 0. Exact for singular covariances too.

    With ``S1 = B1 B1'`` and ``S2 = B2 B2'`` the trace of ``(S1 S2)^(1/2)`` is the sum of the singular values of
    ``B1' B2``. Taken as the roots of eigenvalues instead (of ``S1 S2`` or a symmetric form of it), the many values that
    should be 0 are the roots of rounding errors, 1e-8 each; a singular value has an error of 1e-16.
    """
    dim = len(ref.mean)
    if gen.mean.shape != ref.mean.shape:
        raise ValueError(f"features of different dimensions: {dim} and {len(gen.mean)}")
    fewest = min(ref.n, gen.n)
    if fewest <= dim:
        warnings.warn(f"{fewest} samples of {dim} features: this Fréchet distance is mostly bias", stacklevel=2)
    spread = ref.cov.trace() + gen.cov.trace() - 2 * torch.linalg.svdvals(ref.factor.T @ gen.factor).sum()
    return max(0.0, float((ref.mean - gen.mean).square().sum() + spread))
