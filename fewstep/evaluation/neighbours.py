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

from fewstep.evaluation.features import check_features
from fewstep.precision import products

_CHUNK = 512  # rows of the distance matrix that exist at one time
_GROUPS = 128


@dataclass(frozen=True)
class ManifoldMetrics:
    """Precision, recall and coverage are shares; density may exceed 1, and is 1 on average for real data."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class ManifoldIndicators:
    """What the four metrics are means of, one entry per row, so that rows of two models can be compared in pairs.

    ``precise [M]`` and ``recalled [N]`` (``k_pr``), ``covered [N]`` (``k_dc``) are true or false; ``inside [M]`` counts
    the reference balls (``k_dc``) that hold a generated row.
    """

    precise_M: Tensor
    inside_M: Tensor
    recalled_N: Tensor
    covered_N: Tensor
    k_dc: int

    def summary(self) -> ManifoldMetrics:
        return ManifoldMetrics(
            precision=int(self.precise_M.sum()) / len(self.precise_M),
            recall=int(self.recalled_N.sum()) / len(self.recalled_N),
            density=int(self.inside_M.sum()) / (self.k_dc * len(self.inside_M)),
            coverage=int(self.covered_N.sum()) / len(self.covered_N),
        )


def radii(features_ND: Tensor, k: int, *, chunk: int = _CHUNK) -> Tensor:
    """Distances ``[N, k]`` from each row to its nearest, ..., k-th nearest other row, ascending."""
    check_features(features_ND)
    with products("fp32"):
        return _radii(features_ND.float() - centre_of(features_ND), k, chunk)


def manifold_metrics(
    ref_ND: Tensor,
    gen_MD: Tensor,
    *,
    k_pr: int = 3,
    k_dc: int = 5,
    ref_radii: Tensor | None = None,
    gen_radii: Tensor | None = None,
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
    return manifold_indicators(
        ref_ND, gen_MD, k_pr=k_pr, k_dc=k_dc, ref_radii=ref_radii, gen_radii=gen_radii, chunk=chunk
    ).summary()


def manifold_indicators(
    ref_ND: Tensor,
    gen_MD: Tensor,
    *,
    k_pr: int = 3,
    k_dc: int = 5,
    ref_radii: Tensor | None = None,
    gen_radii: Tensor | None = None,
    chunk: int = _CHUNK,
) -> ManifoldIndicators:
    """The metrics of ``manifold_metrics`` row by row; ``gen_radii`` is ``radii(gen_MD, k)`` with ``k >= k_pr``."""
    check_features(ref_ND, gen_MD)
    centre = centre_of(ref_ND)
    ref, gen = ref_ND.float() - centre, gen_MD.float() - centre
    with products("fp32"):
        if ref_radii is None:
            ref_radii = _radii(ref, max(k_pr, k_dc), chunk)
        if gen_radii is None:
            gen_radii = _radii(gen, k_pr, chunk)
        _check_radii("ref_radii", ref_radii, len(ref), max(k_pr, k_dc))
        _check_radii("gen_radii", gen_radii, len(gen), k_pr)
        narrow_N, wide_N, gen_radii_M = ref_radii[:, k_pr - 1], ref_radii[:, k_dc - 1], gen_radii[:, k_pr - 1]
        precise, inside = [], []
        recalled_N = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
        nearest_N = ref.new_full((len(ref),), torch.inf)
        for start, square_BN in squared_distances(gen, ref, chunk):
            distance_BN = square_BN.sqrt_()
            # Of the ways to ask each of these, the ones that cost a fraction of the product they follow.
            inside.append((distance_BN <= wide_N).sum(1, dtype=torch.int32))
            precise.append((distance_BN <= narrow_N).sum(1, dtype=torch.int32) > 0)
            torch.minimum(nearest_N, distance_BN.amin(0), out=nearest_N)
            recalled_N |= distance_BN.sub_(gen_radii_M[start : start + chunk, None]).amin(0) <= 0
        covered_N = nearest_N <= wide_N
    return ManifoldIndicators(torch.cat(precise), torch.cat(inside), recalled_N, covered_N, k_dc)


def _check_radii(name: str, given: Tensor, rows: int, k: int) -> None:
    if given.ndim != 2 or len(given) != rows or given.shape[1] < k:
        raise ValueError(f"{name} are [{rows}, >= {k}], got {list(given.shape)}")


def centre_of(features_ND: Tensor) -> Tensor:
    """The row nearest to the mean: what to subtract from all features, since the expanded square loses digits to a
    common offset. It serves as well as the mean itself, and leaves integers integers, so that a tie stays a tie."""
    features_ND = features_ND.float()
    mean = features_ND.mean(0)
    return features_ND[_norms(features_ND, mean).argmin()]


def _radii(x_ND: Tensor, k: int, chunk: int) -> Tensor:
    """Each distance is computed once and serves both of its rows: half of the products. Of the later rows those alone
    look at a tile that have a distance in it below the k-th that they know: one in five, after some thousand rows."""
    if not 1 <= k < len(x_ND):
        raise ValueError(f"the {k}-th nearest other of {len(x_ND)} rows does not exist")
    nearest_Nk = x_ND.new_full((len(x_ND), k), torch.inf)  # squared, among the rows seen so far

    def see(rows: slice | Tensor, square_BN: Tensor) -> None:
        found = smallest(square_BN, k)[0] if square_BN.shape[1] > k else square_BN
        nearest_Nk[rows] = torch.cat((nearest_Nk[rows], found), dim=1).topk(k, largest=False, sorted=True).values

    norm_N = _norms(x_ND)
    # Two tiles for all rounds: fresh ones of a different size each time would scatter over the heap.
    tile, turned = (x_ND.new_empty(min(chunk, len(x_ND)) * len(x_ND)) for _ in range(2))
    for start in range(0, len(x_ND), chunk):
        later, norm = x_ND[start:], norm_N[start:]
        rows = min(chunk, len(later))
        square_BN = tile[: rows * len(later)].view(rows, len(later))
        _square(later[:rows], norm[:rows], later, norm, out=square_BN)
        square_BN.diagonal().fill_(torch.inf)  # a row is not its own neighbour
        see(slice(start, start + rows), square_BN)
        beside_BN, known_N = square_BN[:, rows:], nearest_Nk[start + rows :, -1]
        near = (beside_BN.amin(0) < known_N).nonzero()[:, 0]
        if len(near):
            square_NB = turned[: rows * len(near)].view(len(near), rows)
            see(near + start + rows, torch.index_select(beside_BN.T, 0, near, out=square_NB))
    return nearest_Nk.sqrt_()


def squared_distances(a_MD: Tensor, b_ND: Tensor, chunk: int = _CHUNK) -> Iterator[tuple[int, Tensor]]:
    """``(start, |a_i - b_j|^2 [B, N])`` for consecutive chunks of rows of ``a``, each overwritten by the next."""
    tile = a_MD.new_empty(min(chunk, len(a_MD)), len(b_ND))
    a_norm_M, b_norm_N = _norms(a_MD), _norms(b_ND)
    for start in range(0, len(a_MD), chunk):
        a, norm = a_MD[start : start + chunk], a_norm_M[start : start + chunk]
        yield start, _square(a, norm, b_ND, b_norm_N, out=tile[: len(a)])


def _norms(x_ND: Tensor, centre_D: Tensor | float = 0.0) -> Tensor:
    """``|x - centre|^2 [N]``, some rows at a time: whole squares would take as much memory as the features."""
    return torch.cat([(rows - centre_D).square_().sum(1) for rows in x_ND.split(_CHUNK)])


def _square(a_BD: Tensor, a_norm_B: Tensor, b_ND: Tensor, b_norm_N: Tensor, out: Tensor) -> Tensor:
    """``|a|^2 + |b|^2 - 2 a.b``, never below 0."""
    return torch.addmm(b_norm_N, a_BD, b_ND.T, alpha=-2, out=out).add_(a_norm_B[:, None]).clamp_(min=0)


def smallest(values_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest values of each row, ascending, and their columns.

    They lie in the ``k`` groups of columns with the smallest minima, whatever the grouping: a selection among the
    minima and one among the members of ``k`` groups replace one among all columns (five times faster on a CPU).
    """
    rows, columns = values_BN.shape
    size = columns // _GROUPS
    if size < 2 or k > _GROUPS:
        found = values_BN.topk(k, largest=False)
        return found.values, found.indices
    grouped = values_BN[:, : size * _GROUPS].view(rows, size, _GROUPS)  # a group is a strided set of columns
    best_Bk = grouped.amin(1).topk(k, largest=False).indices
    members = grouped.gather(2, best_Bk[:, None, :].expand(rows, size, k)).flatten(1)
    leftover = values_BN[:, size * _GROUPS :]
    found = torch.cat((members, leftover), dim=1).topk(k, largest=False)
    place = found.indices  # first the members, group by group within each stride, then what is left over
    inside = place < size * k
    column = place.div(k, rounding_mode="floor") * _GROUPS + best_Bk.gather(1, place % k)
    return found.values, torch.where(inside, column, place - size * k + size * _GROUPS)
