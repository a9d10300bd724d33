"""Sliced distances: a cheap look at two clouds of features in one direction after the other.

Shapes: N samples of either cloud, D dimensions, P directions.
"""

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features
from fewstep.keys import Key

DIRECTIONS = 1000
_TOGETHER = 64  # directions projected on at a time


def sliced_wasserstein2(ref_ND: Tensor, gen_ND: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """``3 D`` times the mean over directions of the squared gaps of sorted projections (MIND, 2605.06797), in float64.

    ``D`` times that mean is the squared distance between means where only these differ. Directions are functions of
    the seed. ``ValueError`` unless the clouds are equally large. Memory: 64 projections of each.
    """
    check_features(ref_ND, gen_ND)
    if len(ref_ND) != len(gen_ND):
        raise ValueError(f"sorted projections pair clouds of equal size, got {len(ref_ND)} and {len(gen_ND)}")
    dim = ref_ND.shape[1]
    index = torch.arange(directions, device=ref_ND.device)
    total = 0.0
    for some in index.split(_TOGETHER):
        towards_PD = Key(seed).normal("sliced", some, (dim,)).double()
        towards_DP = (towards_PD / towards_PD.norm(dim=1, keepdim=True)).T
        ref_NP, gen_NP = ((each.double() @ towards_DP).sort(dim=0).values for each in (ref_ND, gen_ND))
        total += float((ref_NP - gen_NP).square().mean(0).sum())
    return 3 * dim * total / directions
