"""The Fréchet distance between Gaussians fitted to two sets of features (FID, where the features are Inception's).

``FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)`` (Dowson and Landau 1982; Heusel et al. 1706.08500), with
``ddof = 1`` covariances, no ``eps I``, everything in float64. Shapes: N samples, D dimensions, R rank.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features

_BLOCK = 2048  # rows converted to float64 at a time
_TILE = 256  # columns of a triangular factor that are multiplied at a time
_HALF_FROM = 512  # dimensions from which half of a scatter matrix costs visibly less than all of it
_TOLERATED = 1e-8  # share of the total variance that rounding could cost at worst; it costs 1e-14 in practice


@dataclass(frozen=True)
class Moments:
    """Mean ``[D]`` and covariance ``[D, D]`` (``ddof = 1``) of ``n`` samples, float64.

    ``rows [n, D]`` are the samples less their mean, kept where they are fewer than a covariance's rows (``n <= D``).
    """

    mean: Tensor
    cov: Tensor
    n: int
    rows: Tensor | None = None

    @cached_property
    def factor(self) -> Tensor:
        """``B [D, R]`` with ``B B' = cov`` and ``R`` its numerical rank (``n - 1`` with ``rows``); lower triangular
        where ``R = D``. Computed once: keep a reference's moments."""
        if self.rows is not None:
            # The reflection that takes (1, .., 1) to the first axis, less that axis: n - 1 rows of the same scatter.
            return ((self.rows[1:] + self.rows[0] / (math.sqrt(self.n) - 1)) / math.sqrt(self.n - 1)).T
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
        _add_scatter(scatter, block.double() - mean)
    if len(mean) > _HALF_FROM:
        scatter = _mirrored(scatter)
    few = features_ND.double() - mean if n <= len(mean) else None
    return Moments(mean, scatter / (n - 1), n, few)


def _add_scatter(scatter_DD: Tensor, centred_ND: Tensor) -> None:
    """Add ``X' X``; of a large one the lower triangle alone, and some of what lies beside the diagonal."""
    for start in range(0, len(scatter_DD), _HALF_FROM):
        end = start + _HALF_FROM
        scatter_DD[start:end, :end].addmm_(centred_ND[:, start:end].T, centred_ND[:, :end])


def _mirrored(square: Tensor) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    lower = square.tril()
    return lower + lower.tril(-1).T


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub and LeVeque 1979)."""
    n = a.n + b.n
    shift = b.mean - a.mean
    # The root comes first: the outer product of one vector with itself is symmetric to the bit.
    apart = shift * math.sqrt(a.n * b.n / n / (n - 1))
    cov = (a.cov * ((a.n - 1) / (n - 1))).add_(b.cov, alpha=(b.n - 1) / (n - 1)).addr_(apart, apart)
    mean = a.mean + shift * (b.n / n)
    few = None
    if a.rows is not None and b.rows is not None and n <= len(mean):
        few = torch.cat((a.rows + (a.mean - mean), b.rows + (b.mean - mean)))
    return Moments(mean, cov, n, few)


def frechet_distance(ref: Moments, gen: Moments) -> float:
    """The Fréchet distance of two Gaussians, never below 0. Exact for singular covariances too."""
    _check(ref, gen)
    return max(0.0, _distance(ref, gen))


@dataclass(frozen=True)
class HalfSplit:
    """The Fréchet distance of a sample, with most of the bias of its finite size taken away (which may be below 0) and
    ``plain``. ``whole`` are the sample's moments and ``gram`` is ``congruence`` of the reference's factor with them,
    None where a covariance is singular."""

    value: float
    plain: float
    whole: Moments
    gram: Tensor | None


def half_split(quarters: Sequence[Moments], ref: Moments) -> float:
    """The value of ``half_splits``."""
    return half_splits(quarters, ref).value


def half_splits(quarters: Sequence[Moments], ref: Moments) -> HalfSplit:
    """The Fréchet distance of a sample to ``ref`` less most of the bias that its finite size adds.

    ``quarters`` are the moments of four disjoint parts of the sample. The bias of the plain distance is close to
    ``c / n``, so the six halves that they make have twice that of the whole, and ``2 FD_N`` less their mean has none.
    Where the parts are not equally large, the factor follows from the sizes. Seven distances in all, and four products
    with the reference's factor: moments are merged after a linear map as before it.
    """
    if len(quarters) != 4:
        raise ValueError(f"half splits are made of four disjoint parts, got {len(quarters)}")
    parts = [_Part(each, _mapped(ref, each)) for each in quarters]
    a, b, c, d = parts
    whole = _both(_both(a, b), _both(c, d))
    _check(ref, whole.own)
    plain = _distance(ref, whole.own, whole.gram)
    distances, ratios = [], []
    for pair in ((a, b), (c, d), (a, c), (b, d), (a, d), (b, c)):
        half = _both(*pair)
        distances.append(_distance(ref, half.own, half.gram))
        ratios.append(whole.own.n / half.own.n)
    added = sum(distances) / len(distances) - plain
    return HalfSplit(plain - added / (sum(ratios) / len(ratios) - 1), max(0.0, plain), whole.own, whole.gram)


class _Part(NamedTuple):
    """Moments of a part of a sample, and those of its image under the reference's factor where that is regular."""

    own: Moments
    image: Moments | None

    @property
    def gram(self) -> Tensor | None:
        return None if self.image is None or self.own.rows is not None else self.image.cov


def _mapped(ref: Moments, part: Moments) -> Moments | None:
    """The moments of ``y B``, where ``B`` is the reference's factor and has full rank."""
    if ref.rows is not None or ref.factor.shape != part.cov.shape:
        return None
    return Moments(part.mean @ ref.factor, congruence(ref.factor, part.cov), part.n)


def _both(a: _Part, b: _Part) -> _Part:
    return _Part(merge(a.own, b.own), None if a.image is None or b.image is None else merge(a.image, b.image))


def congruence(factor_DR: Tensor, cov_DD: Tensor) -> Tensor:
    """``B' S B [R, R]`` for symmetric ``S``, symmetric to the bit; half the work where ``B`` is lower triangular."""
    dim, rank = factor_DR.shape
    if rank < dim or dim <= _TILE:
        product = factor_DR.T @ (cov_DD @ factor_DR)
        return (product + product.T) / 2
    product = torch.empty_like(cov_DD)
    starts = range(0, dim, _TILE)
    for start in starts:  # the factor's columns from ``start`` on have nothing above row ``start``
        product[:, start : start + _TILE] = cov_DD[:, start:] @ factor_DR[start:, start : start + _TILE]
    result = torch.empty_like(cov_DD)
    for start in starts:
        end = start + _TILE
        result[start:end, :end] = factor_DR[start:, start:end].T @ product[start:, :end]
    return _mirrored(result)


def _check(ref: Moments, gen: Moments) -> None:
    dim = len(ref.mean)
    if gen.mean.shape != ref.mean.shape:
        raise ValueError(f"features of different dimensions: {dim} and {len(gen.mean)}")
    fewest = min(ref.n, gen.n)
    if fewest <= dim:
        warnings.warn(f"{fewest} samples of {dim} features: this Fréchet distance is mostly bias", stacklevel=3)


def _distance(ref: Moments, gen: Moments, gram: Tensor | None = None) -> float:
    spread = float(ref.cov.trace() + gen.cov.trace())
    return float((ref.mean - gen.mean).square().sum()) + spread - 2 * _trace_of_root(ref, gen, spread, gram)


def _trace_of_root(ref: Moments, gen: Moments, spread: float, gram: Tensor | None) -> float:
    """``tr (S1 S2)^(1/2)``: with ``S1 = B1 B1'`` and ``S2 = B2 B2'``, the sum of the singular values of ``B1' B2``.

    Their squares are the eigenvalues of ``B1' S2 B1`` (or of ``B2' S1 B2``), which cost a quarter of that. But an
    eigenvalue carries a rounding error of the size of the largest one's last digits, and its root, if it should be 0,
    one of 1e-8 instead of 1e-16. So the singular values are taken where a covariance is singular, or where that error
    could be seen in the sum. ``gram`` is ``B1' S2 B1`` where it is known already.
    """
    few, whole = (gen, ref) if gen.rows is not None else (ref, gen)
    regular = whole.rows is None and (few.rows is not None or few.factor.shape[1] == len(few.mean))
    if regular:
        if gram is None:
            gram = congruence(few.factor, whole.cov)
        values = torch.linalg.eigvalsh(gram)
        digit = 2 * torch.finfo(values.dtype).eps * float(values[-1])
        if float(values[0]) > 2 * math.sqrt(len(values)) * digit:
            roots = values.sqrt()
            if digit * float((0.5 / roots).sum()) <= _TOLERATED * spread:
                return float(roots.sum())
    return float(torch.linalg.svdvals(ref.factor.T @ gen.factor).sum())
