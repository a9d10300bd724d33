"""Precision, recall, density and coverage: do samples lie where data lies, and is data reached everywhere?

A set of features stands for the union of balls around its members, each as wide as the distance to the member's k-th
nearest other one. Precision and recall: Kynkäänniemi et al. 1904.06991. Density and coverage: Naeem et al. 2002.09797.
Conventions that differ in silence elsewhere: balls are closed (``<=``), and a point is told from its own neighbours by
its index, so that an exact copy is a neighbour at distance 0.

Shapes: N reference rows, M generated rows, D dimensions, B rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features, full_float32

_CHUNK = 512  # rows of the distance matrix that exist at one time
_GROUPS = 128


@dataclass(frozen=True)
class ManifoldMetrics:
    """Precision, recall and coverage are shares; density may exceed 1, and is 1 on average for real data."""

    precision: float
    recall: float
    density: float
    coverage: float


def radii(features_ND: Tensor, k: int, *, chunk: int = _CHUNK) -> Tensor:
    """Distances ``[N, k]`` from each row to its nearest, ..., k-th nearest other row, ascending."""
    check_features(features_ND)
    with full_float32():
        return _radii(features_ND.float() - _centre(features_ND), k, chunk)


def manifold_metrics(
    ref_ND: Tensor,
    gen_MD: Tensor,
    *,
    k_pr: int = 3,
    k_dc: int = 5,
    ref_radii: Tensor | None = None,
    chunk: int = _CHUNK,
) -> ManifoldMetrics:
    """All four metrics of generated features ``[M, D]`` against reference features ``[N, D]``.

    * precision: the share of generated rows in at least one reference ball (``k_pr``)
    * recall: the share of reference rows in at least one generated ball (``k_pr``)
    * density: how many reference balls (``k_dc``) hold a generated row, on average, divided by ``k_dc``
    * coverage: the share of reference balls (``k_dc``) that hold a generated row

    ``ref_radii`` is ``radii(ref_ND, k)`` with ``k >= max(k_pr, k_dc)``, computed once for many calls. Memory: ``chunk``
    rows of the largest distance matrix.
    """
    check_features(ref_ND, gen_MD)
    centre = _centre(ref_ND)
    ref, gen = ref_ND.float() - centre, gen_MD.float() - centre
    with full_float32():
        if ref_radii is None:
            ref_radii = _radii(ref, max(k_pr, k_dc), chunk)
        if len(ref_radii) != len(ref) or ref_radii.shape[1] < max(k_pr, k_dc):
            raise ValueError(f"ref_radii are [{len(ref)}, >= {max(k_pr, k_dc)}], got {list(ref_radii.shape)}")
        narrow_N, wide_N = ref_radii[:, k_pr - 1], ref_radii[:, k_dc - 1]
        gen_radii_M = _radii(gen, k_pr, chunk)[:, -1]
        precise = inside = 0
        recalled_N = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        covered_N = torch.zeros_like(recalled_N)
        for start, distance_BN in _distances(gen, ref, chunk):
            in_wide_BN = distance_BN <= wide_N
            precise += int((distance_BN <= narrow_N).any(1).sum())
            inside += int(in_wide_BN.sum())
            covered_N |= in_wide_BN.any(0)
            recalled_N |= (distance_BN <= gen_radii_M[start : start + chunk, None]).any(0)
    return ManifoldMetrics(
        precision=precise / len(gen),
        recall=float(recalled_N.double().mean()),
        density=inside / (k_dc * len(gen)),
        coverage=float(covered_N.double().mean()),
    )


def _centre(features_ND: Tensor) -> Tensor:
    """The row nearest to the mean: what to subtract from all features, since the expanded square loses digits to a
    common offset. It serves as well as the mean itself, and leaves integers integers, so that a tie stays a tie."""
    features_ND = features_ND.float()
    return features_ND[(features_ND - features_ND.mean(0)).square().sum(1).argmin()]


def _radii(x_ND: Tensor, k: int, chunk: int) -> Tensor:
    if not 1 <= k < len(x_ND):
        raise ValueError(f"the {k}-th nearest other of {len(x_ND)} rows does not exist")
    nearest = []
    for start, distance_BN in _distances(x_ND, x_ND, chunk):
        distance_BN.diagonal(offset=start).fill_(torch.inf)  # row b of this chunk is column start + b
        nearest.append(_smallest(distance_BN, k))
    return torch.cat(nearest)


def _distances(a_MD: Tensor, b_ND: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """``(start, |a_i - b_j| [B, N])`` for consecutive chunks of rows of ``a``, from ``|a|^2 + |b|^2 - 2 a.b``."""
    b_square_N = b_ND.square().sum(1)
    for start in range(0, len(a_MD), chunk):
        a = a_MD[start : start + chunk]
        square = torch.addmm(b_square_N, a, b_ND.T, alpha=-2).add_(a.square().sum(1, keepdim=True))
        yield start, square.clamp_(min=0).sqrt_()


def _smallest(values_BN: Tensor, k: int) -> Tensor:
    """The ``k`` smallest values of each row, ascending.

    They lie in the ``k`` groups of columns with the smallest minima, whatever the grouping: a selection among the
    minima and one among the members of ``k`` groups replace one among all columns (five times faster on a CPU).
    """
    rows, columns = values_BN.shape
    size = columns // _GROUPS
    if size < 2 or k > _GROUPS:
        return values_BN.topk(k, largest=False).values
    grouped = values_BN[:, : size * _GROUPS].view(rows, size, _GROUPS)  # a group is a strided set of columns
    best = grouped.amin(1).topk(k, largest=False).indices
    members = grouped.gather(2, best[:, None, :].expand(rows, size, k)).flatten(1)
    leftover = values_BN[:, size * _GROUPS :]
    return torch.cat((members, leftover), dim=1).topk(k, largest=False).values
