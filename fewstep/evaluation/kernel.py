"""The kernel distance between two sets of features (KID, where the features are Inception's).

The unbiased squared maximum mean discrepancy with the cubic kernel ``k(x, y) = (x.y / D + 1)^3`` (Bińkowski et al.
1801.01401), as the U-statistic over all pairs: no subsets are drawn, so the value has no seed. Not clamped (it is
negative half the time when the distributions agree) and not multiplied by 1000.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features

_CHUNK = 512  # rows and columns of the kernel matrix that exist at one time


@dataclass(frozen=True)
class KernelMeans:
    """Mean kernels of N reference and M generated rows, from which the distance and its influence follow.

    ``ref``: over the ordered pairs of different reference rows. ``gen_M``, ``cross_M``: of each generated row with the
    other generated rows, with the reference rows.
    """

    ref: float
    gen_M: Tensor
    cross_M: Tensor

    @property
    def distance(self) -> float:
        return self.ref + float(self.gen_M.mean()) - 2 * float(self.cross_M.mean())


def kernel_distance(ref_ND: Tensor, gen_MD: Tensor, *, chunk: int = _CHUNK) -> float:
    """``sum_{i != j} k(x_i, x_j) / (N (N - 1)) + the same for y - 2 mean k(x_i, y_j)``, in float64.

    Features ``[N, D]`` and ``[M, D]``, at least two each. Memory: ``chunk`` rows of both in float64, and their kernels.
    """
    return kernel_means(ref_ND, gen_MD, chunk=chunk).distance


def kernel_means(ref_ND: Tensor, gen_MD: Tensor, *, ref: float | None = None, chunk: int = _CHUNK) -> KernelMeans:
    """What the distance is made of; ``ref`` is ``kernel_mean(ref_ND)``, computed once for many calls."""
    check_features(ref_ND, gen_MD)
    if ref is None:
        ref = kernel_mean(ref_ND, chunk=chunk)
    cross_M = torch.zeros(len(gen_MD), dtype=torch.float64, device=gen_MD.device)
    for start in range(0, len(gen_MD), chunk):
        rows = gen_MD[start : start + chunk].double()
        for columns in ref_ND.split(chunk):
            cross_M[start : start + chunk] += _kernel(rows, columns).sum(1)
    return KernelMeans(ref, _means_with_others(gen_MD, chunk), cross_M / len(ref_ND))


def kernel_mean(features_ND: Tensor, *, chunk: int = _CHUNK) -> float:
    """The mean kernel over the ordered pairs of different rows."""
    check_features(features_ND)
    return float(_means_with_others(features_ND, chunk).mean())


def _means_with_others(x_ND: Tensor, chunk: int) -> Tensor:
    """``[N]``: the mean kernel of each row with the others. A pair is computed once and counts for both."""
    total_N = torch.zeros(len(x_ND), dtype=torch.float64, device=x_ND.device)
    for start in range(0, len(x_ND), chunk):
        rows = x_ND[start : start + chunk].double()
        own_BB = _kernel(rows, rows)
        total_N[start : start + chunk] += own_BB.sum(1) - own_BB.diagonal()
        for later in range(start + chunk, len(x_ND), chunk):
            kernel_BB = _kernel(rows, x_ND[later : later + chunk])
            total_N[start : start + chunk] += kernel_BB.sum(1)
            total_N[later : later + chunk] += kernel_BB.sum(0)
    return total_N / (len(x_ND) - 1)


def _kernel(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """In float64: the three terms of a distance agree to most of their digits before they cancel."""
    one = torch.ones((), dtype=x_BD.dtype, device=x_BD.device)
    inner = torch.addmm(one, x_BD, y_ND.double().T, alpha=1 / x_BD.shape[1])
    return inner.square().mul_(inner)
