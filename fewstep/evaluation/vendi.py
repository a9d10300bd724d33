"""The Vendi score: how many different things a set of samples holds (Friedman and Dieng 2210.02410).

No reference enters: 1 for copies of one sample, N for N samples whose features are orthogonal.
"""

import math

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features

_BLOCK = 2048  # rows converted to float64 at a time


def vendi_score(features_ND: Tensor) -> float:
    """``exp`` of the entropy of the eigenvalues of ``K / N``, ``K`` the cosine similarities of features ``[N, D]``.

    Taken from the ``D x D`` matrix that has the same eigenvalues, or from ``K`` where there are fewer samples than
    features. ``ValueError`` where a row is zero.
    """
    check_features(features_ND)
    length_N = features_ND.double().norm(dim=1)
    if not bool((length_N > 0).all()):
        raise ValueError("features of length 0 have no direction")
    n, dim = features_ND.shape
    if n <= dim:
        unit_ND = features_ND.double() / length_N[:, None]
        gram = unit_ND @ unit_ND.T
    else:
        gram = torch.zeros(dim, dim, dtype=torch.float64, device=features_ND.device)
        for block, length in zip(features_ND.split(_BLOCK), length_N.split(_BLOCK), strict=True):
            unit_BD = block.double() / length[:, None]
            gram.addmm_(unit_BD.T, unit_BD)
    values = torch.linalg.eigvalsh(gram / n).clamp(min=0)
    return math.exp(-float(torch.xlogy(values, values).sum()))
