"""CMMD: the maximum mean discrepancy of CLIP embeddings under a Gaussian kernel (Jayasumana et al. 2401.09603).

``1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))`` with ``k(x, y) = exp(-|x - y|^2 / (2 sigma^2))``, sigma 10,
on embeddings scaled to length 1. The biased estimate, diagonal included, as defined: not below 0, and 0 for equal sets.
"""

from torch import Tensor

from fewstep.evaluation.features import check_features

_SIGMA = 10.0
_SCALE = 1000.0
_CHUNK = 512  # rows of a kernel matrix that exist at one time


def cmmd(ref: Tensor, gen: Tensor, *, chunk: int = _CHUNK) -> float:
    """CMMD of generated embeddings ``[M, D]`` against reference ones ``[N, D]``, each scaled to length 1, in float64.

    ``ValueError`` where an embedding is zero.
    """
    check_features(ref, gen)
    x, y = _unit(ref), _unit(gen)
    return _SCALE * (_mean(x, x, chunk) + _mean(y, y, chunk) - 2 * _mean(x, y, chunk))


def _unit(features_ND: Tensor) -> Tensor:
    features_ND = features_ND.double()
    length_N1 = features_ND.norm(dim=1, keepdim=True)
    if not bool((length_N1 > 0).all()):
        raise ValueError("an embedding of length 0 has no direction")
    return features_ND / length_N1


def _mean(x_ND: Tensor, y_MD: Tensor, chunk: int) -> float:
    """The mean of ``k - 1``: kernels lie within 2 % of 1, and the ones cancel between the three terms."""
    total = 0.0
    for start in range(0, len(x_ND), chunk):
        # |x - y|^2 / (2 sigma^2) = (1 - x.y) / sigma^2
        total += float(((x_ND[start : start + chunk] @ y_MD.T - 1) / _SIGMA**2).expm1_().sum())
    return total / (len(x_ND) * len(y_MD))
