"""Real data against real data: what sampling noise alone costs."""

import statistics

import torch

from fewstep.evaluation.features import metric_name
from fewstep.evaluation.frechet import moments
from fewstep.evaluation.metrics import compare
from fewstep.evaluation.neighbours import radii
from fewstep.evaluation.protocol import FLOOR_SPLITS
from fewstep.evaluation.reference import K, ReferenceFeatures
from fewstep.keys import Key


def real_floor(reference: ReferenceFeatures, n: int) -> dict[str, float]:
    """The metrics of real data against other real data; empty where there are no features.

    Means over random splits into two disjoint halves. Between samples of one distribution the expected
    Fréchet distance is ``c (1/n_ref + 1/n)`` to first order, so the halves' value is scaled to ``n`` samples against
    the whole reference; the other metrics stay as the halves gave them.
    """
    if reference.features is None:
        return {}
    everything = torch.arange(len(reference.features))
    half = len(everything) // 2
    if half <= K:
        return {}
    splits = []
    for split in range(FLOOR_SPLITS):
        order = Key(0, split).uniform("floor", everything).argsort(stable=True).to(reference.features.device)
        a, b = reference.features[order[:half]], reference.features[order[half:]]
        splits.append(compare(ReferenceFeatures(reference.extractor, a, moments(a), radii(a, K)), b))
    floor = {name: statistics.mean(values[name] for values in splits) for name in splits[0]}
    rest = len(everything) - half
    distance = metric_name("fd", reference.extractor.name)
    floor[distance] *= (1 / reference.moments.n + 1 / n) / (1 / half + 1 / rest)
    return floor
