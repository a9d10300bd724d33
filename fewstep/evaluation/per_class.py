"""Metrics class by class: a mean over everything can hide a class that a student has lost.

Shapes: N rows, D features, labels ``[N]`` in ``0 .. classes - 1``. A class without enough rows has NaN.
"""

import math
import warnings

import torch
from torch import Tensor

from fewstep.evaluation.frechet import Moments, frechet_distance, moments


def moments_per_class(features_ND: Tensor, labels_N: Tensor, classes: int) -> list[Moments | None]:
    """The moments of each class, None where it has fewer than two rows."""
    labels_N = _checked(features_ND, labels_N, classes)
    return [
        moments(features_ND[labels_N == label]) if int((labels_N == label).sum()) > 1 else None
        for label in range(classes)
    ]


def frechet_per_class(ref: list[Moments | None], gen: list[Moments | None]) -> list[float]:
    """The Fréchet distance within each class. Mostly bias for the classes of ``few_samples``."""
    if len(ref) != len(gen):
        raise ValueError(f"{len(ref)} classes against {len(gen)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mostly bias", category=UserWarning)
        return [
            frechet_distance(a, b) if a is not None and b is not None else math.nan
            for a, b in zip(ref, gen, strict=True)
        ]


def few_samples(ref: list[Moments | None], gen: list[Moments | None]) -> list[int]:
    """The classes with no more samples than features on either side, where a Fréchet distance is mostly bias."""
    return [
        label
        for label, pair in enumerate(zip(ref, gen, strict=True))
        if any(each is None or each.n <= len(each.mean) for each in pair)
    ]


def mean_per_class(values_N: Tensor, labels_N: Tensor, classes: int) -> list[float]:
    """The mean of an indicator, such as a row of ``ManifoldIndicators``, over the rows of each class."""
    labels_N = _checked(values_N, labels_N, classes)
    total = torch.zeros(classes, dtype=torch.float64, device=values_N.device)
    total.index_add_(0, labels_N, values_N.double())
    counts = torch.bincount(labels_N, minlength=classes)
    return [float(t) / int(n) if int(n) else math.nan for t, n in zip(total, counts, strict=True)]


def _checked(values_N: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    if labels_N.shape != values_N.shape[:1]:
        raise ValueError(f"one label per row: {len(values_N)} rows, labels {list(labels_N.shape)}")
    if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < classes:
        raise ValueError(f"labels lie in 0 .. {classes - 1}, got {int(labels_N.min())} .. {int(labels_N.max())}")
    return labels_N.to(values_N.device)
