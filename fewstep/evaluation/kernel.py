"""The kernel distance between two sets of features (KID, where the features are Inception's).

The unbiased squared maximum mean discrepancy with the cubic kernel ``k(x, y) = (x.y / D + 1)^3`` (Bińkowski et al.
1801.01401), as the U-statistic over all pairs: no subsets are drawn, so the value has no seed. Not clamped (it is
negative half the time when the distributions agree) and not multiplied by 1000.
"""

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features


def kernel_distance(ref_ND: Tensor, gen_MD: Tensor, *, chunk: int = 256) -> float:
    """``sum_{i != j} k(x_i, x_j) / (N (N - 1)) + the same for y - 2 mean k(x_i, y_j)``, in float64.

    Features ``[N, D]`` and ``[M, D]``, at least two each. Memory: ``chunk`` rows of the larger kernel matrix.
    """
    check_features(ref_ND, gen_MD)
    # The three terms agree to most of their digits before they cancel, so every product is in float64.
    ref, gen = ref_ND.double(), gen_MD.double()
    cross = sum(_kernel_sum(rows, gen) for rows in ref.split(chunk)) / (len(ref) * len(gen))
    return _mean_of_pairs(ref, chunk) + _mean_of_pairs(gen, chunk) - 2 * cross


def _mean_of_pairs(x: Tensor, chunk: int) -> float:
    """The mean kernel over ordered pairs of different rows, from the blocks on and above the diagonal."""
    total = 0.0
    for start in range(0, len(x), chunk):
        rows, later = x[start : start + chunk], x[start + chunk :]
        total += _kernel_sum(rows, rows) + 2 * _kernel_sum(rows, later)
    itself = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return (total - float(itself)) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    one = torch.ones((), dtype=x.dtype, device=x.device)
    inner = torch.addmm(one, x, y.T, alpha=1 / x.shape[1]).flatten()
    return float(torch.dot(inner.square(), inner))  # the sum of cubes
