"""Thin stand-ins for functions of other files."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.frechet import Moments, frechet_distance, merge
from fewstep.evaluation.neighbours import _centre, _distances, _radii


def half_split(quarters: Sequence[Moments], ref: Moments) -> float:
    a, b, c, d = quarters
    halves = [merge(*pair) for pair in ((a, b), (c, d), (a, c), (b, d), (a, d), (b, c))]
    whole = merge(halves[0], halves[1])
    return 2 * frechet_distance(ref, whole) - sum(frechet_distance(ref, half) for half in halves) / len(halves)


def frechet_influence(ref: Moments, gen: Moments, features_MD: Tensor) -> Tensor:
    if gen.n <= len(gen.mean):
        raise ValueError("an influence needs more samples than dimensions")
    B = ref.factor
    values, vectors = torch.linalg.eigh(B.T @ gen.cov @ B)
    kept = values > values.max() * 1e-12
    half = B @ (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T
    T = half @ B.T
    y = features_MD.double() - gen.mean
    h = 2 * y @ (gen.mean - ref.mean) + (y.square().sum(1) - ((y @ T) * y).sum(1))
    return h - h.mean()


def kernel_influence(ref_ND: Tensor, gen_MD: Tensor) -> Tensor:
    x, y = ref_ND.double(), gen_MD.double()
    parts = []
    for rows in y.split(256):
        own = (rows @ y.T / y.shape[1] + 1).pow(3).mean(1)
        parts.append(2 * (own - (rows @ x.T / y.shape[1] + 1).pow(3).mean(1)))
    return torch.cat(parts)


def interval(value: float, influence_M: Tensor, level: float = 0.95) -> tuple[float, float]:
    assert level == 0.95
    error = 1.959964 * float(influence_M.double().std()) / len(influence_M) ** 0.5
    return value - error, value + error


def paired(influence_a: Tensor, influence_b: Tensor) -> float:
    return float((influence_a.double() - influence_b.double()).std()) / len(influence_a) ** 0.5


def heavy(influence: Tensor) -> bool:
    ordered = (influence.double() - influence.double().mean()).square().sort(descending=True).values
    return bool(ordered[: max(1, len(ordered) // 100)].sum() > 0.5 * ordered.sum())


@dataclass(frozen=True)
class ManifoldIndicators:
    precise_M: Tensor
    inside_M: Tensor
    recalled_N: Tensor
    covered_N: Tensor


def manifold_indicators(
    ref_ND: Tensor,
    gen_MD: Tensor,
    *,
    k_pr: int = 3,
    k_dc: int = 5,
    ref_radii: Tensor | None = None,
    chunk: int = 512,
) -> ManifoldIndicators:
    centre = _centre(ref_ND)
    ref, gen = ref_ND.float() - centre, gen_MD.float() - centre
    if ref_radii is None:
        ref_radii = _radii(ref, max(k_pr, k_dc), chunk)
    narrow_N, wide_N = ref_radii[:, k_pr - 1], ref_radii[:, k_dc - 1]
    gen_radii_M = _radii(gen, k_pr, chunk)[:, -1]
    recalled_N = torch.zeros(len(ref), dtype=torch.bool, device=ref.device)
    covered_N = torch.zeros_like(recalled_N)
    precise, inside = [], []
    for start, distance_BN in _distances(gen, ref, chunk):
        in_wide_BN = distance_BN <= wide_N
        precise.append((distance_BN <= narrow_N).any(1))
        inside.append(in_wide_BN.sum(1))
        covered_N |= in_wide_BN.any(0)
        recalled_N |= (distance_BN <= gen_radii_M[start : start + chunk, None]).any(0)
    return ManifoldIndicators(torch.cat(precise), torch.cat(inside), recalled_N, covered_N)
