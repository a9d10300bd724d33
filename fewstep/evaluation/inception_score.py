"""The Inception score: are samples of definite classes, and of many (Salimans et al. 1606.03498)?

Of any classifier's logits, ``[N, K]``. No reference enters, so it says nothing about likeness to data. Comparable only
at the same number of samples and parts: papers print ten parts of 5,000.
"""

import itertools
import math
import statistics

import torch
from torch import Tensor

_BLOCK = 4096  # rows converted to float64 at a time


def inception_score(logits_NK: Tensor, parts: int = 10) -> tuple[float, float]:
    """Mean and standard deviation (``ddof = 1``; NaN for one part) over consecutive parts of the samples of
    ``exp(mean_j KL(p(. | y_j) to the part's mean p))``, in float64.

    Parts follow the order of the samples, which are nowhere shuffled, and differ by one sample at most.
    """
    if logits_NK.ndim != 2 or not 1 <= parts <= len(logits_NK):
        raise ValueError(f"logits are [N, classes] with at least one row per part ({parts}): {list(logits_NK.shape)}")
    if not bool(torch.isfinite(logits_NK).all()):
        raise ValueError("logits hold NaN or infinite values")
    n = len(logits_NK)
    edges = [part * n // parts for part in range(parts + 1)]
    scores = [_score(logits_NK[start:end]) for start, end in itertools.pairwise(edges)]
    return statistics.fmean(scores), statistics.stdev(scores) if parts > 1 else math.nan


def _score(logits_NK: Tensor) -> float:
    """The mean divergence is the entropy of the mean less the mean of the entropies."""
    total = torch.zeros(logits_NK.shape[1], dtype=torch.float64, device=logits_NK.device)
    negative_entropy = 0.0
    for block in logits_NK.split(_BLOCK):
        log_p = block.double().log_softmax(1)
        p = log_p.exp()
        total += p.sum(0)
        negative_entropy += float((p * log_p).sum())
    mean = total / len(logits_NK)
    return math.exp(negative_entropy / len(logits_NK) - float(torch.xlogy(mean, mean).sum()))
