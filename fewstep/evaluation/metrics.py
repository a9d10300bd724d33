"""Every metric of one set of features against a reference, with what its interval and paired differences need.

Shapes: N reference samples, M generated ones, D features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.evaluation.features import metric_name
from fewstep.evaluation.frechet import frechet_distance, half_split, moments
from fewstep.evaluation.intervals import frechet_influence, heavy, interval, kernel_influence_from, paired
from fewstep.evaluation.kernel import kernel_means
from fewstep.evaluation.neighbours import manifold_indicators, manifold_metrics
from fewstep.evaluation.protocol import K_DENSITY_COVERAGE, K_PRECISION_RECALL, LEVEL
from fewstep.evaluation.reference import ReferenceFeatures
from fewstep.evaluation.results import Measured

KINDS = ("fd", "fd_debiased", "kd", "precision", "recall", "density", "coverage")
_RANGES = {"precision": (0.0, 1.0), "recall": (0.0, 1.0), "coverage": (0.0, 1.0), "density": (0.0, math.inf)}


@dataclass(frozen=True)
class Outcome:
    """Metrics by their full names, and the influence of each sample (of recall and coverage: of each reference sample)
    on those that have one: a mean of them is the metric's error, and pairs of them that of a difference. ``heavy``
    names metrics of which a few samples carry most of the variance."""

    metrics: Mapping[str, Measured]
    influences: Mapping[str, Tensor] = field(default_factory=dict)
    heavy: tuple[str, ...] = ()


def compare(reference: ReferenceFeatures, features: Tensor) -> dict[str, float]:
    """The values alone, of all that has one without intervals: for means over several sets."""
    name = reference.extractor.name
    found = {metric_name("fd", name): frechet_distance(reference.moments, moments(features))}
    if reference.features is None or reference.radii is None:
        return found
    manifold = manifold_metrics(
        reference.features,
        features,
        k_pr=K_PRECISION_RECALL,
        k_dc=K_DENSITY_COVERAGE,
        ref_radii=reference.radii,
    )
    return {
        **found,
        metric_name("kd", name): kernel_means(reference.features, features, ref=reference.kernel_mean).distance,
        metric_name("precision", name): manifold.precision,
        metric_name("recall", name): manifold.recall,
        metric_name("density", name): manifold.density,
        metric_name("coverage", name): manifold.coverage,
    }


def outcome(reference: ReferenceFeatures, features: Tensor, *, classes: int = 0) -> Outcome:
    """Distances and manifold metrics of features ``[M, D]``, whose row ``i`` is of class ``i mod classes``.

    A reference without features has no kernel distance and no neighbours.
    """
    found = [_frechet(reference, features, max(1, classes))]
    if reference.features is not None and reference.radii is not None:
        found += [_kernel(reference, features), _manifold(reference, features)]
    return Outcome(
        {name: measured for part in found for name, measured in part.metrics.items()},
        {name: influence for part in found for name, influence in part.influences.items()},
        tuple(name for part in found for name in part.heavy),
    )


def _frechet(reference: ReferenceFeatures, features: Tensor, classes: int) -> Outcome:
    gen, name = moments(features), reference.extractor.name
    plain = frechet_distance(reference.moments, gen)
    fd, debiased = metric_name("fd", name), metric_name("fd_debiased", name)
    if len(features) // 2 <= features.shape[1]:  # halves of fewer samples than dimensions follow another law
        return Outcome({fd: Measured(plain)})
    quarter = torch.arange(len(features), device=features.device) // classes % 4
    value = half_split([moments(features[quarter == k]) for k in range(4)], reference.moments)
    influence = frechet_influence(reference.moments, gen, features)
    low, high = interval(value, influence, LEVEL)
    return Outcome(
        {fd: Measured(plain, low, high), debiased: Measured(value, low, high)},
        {debiased: influence},
        (fd, debiased) if heavy(influence) else (),
    )


def _kernel(reference: ReferenceFeatures, features: Tensor) -> Outcome:
    assert reference.features is not None
    name = metric_name("kd", reference.extractor.name)
    means = kernel_means(reference.features, features, ref=reference.kernel_mean)
    influence, value = kernel_influence_from(means), means.distance
    return Outcome(
        {name: Measured(value, *interval(value, influence, LEVEL))},
        {name: influence},
        (name,) if heavy(influence) else (),
    )


def _manifold(reference: ReferenceFeatures, features: Tensor) -> Outcome:
    assert reference.features is not None
    found = manifold_indicators(
        reference.features,
        features,
        k_pr=K_PRECISION_RECALL,
        k_dc=K_DENSITY_COVERAGE,
        ref_radii=reference.radii,
    )
    influences = {
        "precision": found.precise_M.double(),
        "recall": found.recalled_N.double(),
        "density": found.inside_M.double() / K_DENSITY_COVERAGE,
        "coverage": found.covered_N.double(),
    }
    metrics, named = {}, {}
    for kind, influence in influences.items():
        name = metric_name(kind, reference.extractor.name)
        least, most = _RANGES[kind]
        value = float(influence.mean())
        named[name] = influence
        if not bool(influence.std() > 0):  # none or all of them: a normal interval would be a point
            metrics[name] = Measured(value)
            continue
        low, high = interval(value, influence, LEVEL)
        metrics[name] = Measured(value, max(low, least), min(high, most))
    return Outcome(metrics, named)


def differences(
    metrics: Mapping[str, Measured],
    influences: Mapping[str, Tensor],
    anchor: Mapping[str, Measured],
    anchor_influences: Mapping[str, Tensor],
) -> dict[str, Measured]:
    """Metrics minus those of another row of the same noise, with the ends of their 95 % interval: of all that both have
    an influence for. Of the Fréchet distance it is the difference of the debiased values: the bias does not cancel."""
    found = {}
    for name, influence in influences.items():
        other = anchor_influences.get(name)
        if other is None or len(other) != len(influence):
            continue
        value = metrics[name].value - anchor[name].value
        error = _quantile() * paired(influence.double().cpu(), other.double().cpu())
        found[name] = Measured(value, value - error, value + error) if error > 0 else Measured(value)
    return found


def _quantile() -> float:
    """How many standard errors reach to the end of a normal interval."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(LEVEL, dtype=torch.float64)))
