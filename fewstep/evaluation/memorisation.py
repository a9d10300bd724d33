"""Does a model copy its training data? Two answers from nearest neighbours, each a mean over samples.

Distances to the nearest rows are exact to float64: the fast expanded square, which gives an exact copy a small distance
instead of 0, only proposes candidates. The training set is the one that the model saw, whatever the reference is.

Shapes: M generated rows, N training rows, D dimensions.
"""

import torch
from torch import Tensor

from fewstep.evaluation.features import check_features
from fewstep.evaluation.neighbours import centre_of, smallest, squared_distances
from fewstep.precision import products

_CANDIDATES = 4  # proposed in float32, decided in float64
_CHUNK = 512


def memorised_share(gen: Tensor, train: Tensor, held_out: Tensor) -> float:
    """The share of samples nearer to the training set than to as many held-out rows: 1/2 where nothing is memorised.

    Ties count half. ``ValueError`` unless both sets are equally large, since a larger one is nearer by its size alone.
    """
    return float(nearer_to_training(gen, train, held_out).mean())


def authentic_share(gen: Tensor, train: Tensor, train_distance_N: Tensor | None = None) -> float:
    """AuthPct (Alaa et al. 2102.08921) as a share: of samples whose nearest training row has another training row
    nearer (strictly) than the sample is. ``train_distance_N`` is ``nearest_other(train)``, once for many calls."""
    return float(authentic(gen, train, train_distance_N).double().mean())


def nearer_to_training(gen_MD: Tensor, train_ND: Tensor, held_out_ND: Tensor) -> Tensor:
    """1 (nearer to the training set), 0 or 1/2 (a tie) for each generated row ``[M]``, float64."""
    if len(train_ND) != len(held_out_ND):
        raise ValueError(f"equally large sets are compared: {len(train_ND)} training rows, {len(held_out_ND)} held out")
    to_train_M, _ = nearest(gen_MD, train_ND)
    to_held_out_M, _ = nearest(gen_MD, held_out_ND)
    return (to_train_M < to_held_out_M).double() + 0.5 * (to_train_M == to_held_out_M).double()


def authentic(gen_MD: Tensor, train_ND: Tensor, train_distance_N: Tensor | None = None) -> Tensor:
    """Whether each generated row ``[M]`` is farther from its nearest training row than that row's nearest other one."""
    distance_M, index_M = nearest(gen_MD, train_ND)
    if train_distance_N is None:
        train_distance_N = nearest_other(train_ND)
    if train_distance_N.shape != train_ND.shape[:1]:
        raise ValueError(f"one distance per training row: {list(train_distance_N.shape)} for {len(train_ND)} rows")
    return train_distance_N[index_M] < distance_M


def nearest(x_MD: Tensor, among_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Distance ``[M]`` (float64) of each row of ``x`` to the nearest row of ``among``, and that row's index ``[M]``."""
    check_features(x_MD, among_ND)
    return _nearest(x_MD, among_ND, itself=False)


def nearest_other(x_ND: Tensor) -> Tensor:
    """Distance ``[N]`` (float64) of each row to the nearest other one; an exact copy is at 0."""
    check_features(x_ND)
    return _nearest(x_ND, x_ND, itself=True)[0]


def _nearest(x_MD: Tensor, among_ND: Tensor, itself: bool) -> tuple[Tensor, Tensor]:
    centre = centre_of(among_ND)
    x, among = x_MD.float() - centre, among_ND.float() - centre
    k = min(_CANDIDATES, len(among) - itself)
    distances, indices = [], []
    with products("fp32"):
        for start, square_BN in squared_distances(x, among, _CHUNK):
            if itself:
                square_BN.diagonal(offset=start).fill_(torch.inf)
            candidate_Bk = smallest(square_BN, k)[1]
            rows_BD = x_MD[start : start + _CHUNK].double()
            exact_Bk = (among_ND[candidate_Bk].double() - rows_BD[:, None]).norm(dim=2)
            distance_B, best_B = exact_Bk.min(1)
            distances.append(distance_B)
            indices.append(candidate_Bk.gather(1, best_B[:, None])[:, 0])
    return torch.cat(distances), torch.cat(indices)
