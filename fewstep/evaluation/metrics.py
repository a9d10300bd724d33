"""Every metric of one set of features against a reference, with what its interval and paired differences need.

Shapes: N reference samples, M generated ones, D features, K classes of a classifier.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from fewstep.evaluation.cmmd import cmmd
from fewstep.evaluation.extractor import Everything
from fewstep.evaluation.features import class_accuracy, metric_name
from fewstep.evaluation.frechet import frechet_distance, half_splits, moments
from fewstep.evaluation.inception_score import inception_score
from fewstep.evaluation.intervals import (
    frechet_influence,
    heavy,
    interval,
    kernel_influence_from,
    paired,
)
from fewstep.evaluation.kernel import kernel_means
from fewstep.evaluation.memorisation import authentic, nearer_to_training
from fewstep.evaluation.neighbours import manifold_indicators, manifold_metrics
from fewstep.evaluation.per_class import few_samples, frechet_per_class, mean_per_class, moments_per_class
from fewstep.evaluation.protocol import K_DENSITY_COVERAGE, K_PRECISION_RECALL, LEVEL, SCORE_PARTS
from fewstep.evaluation.reference import ReferenceFeatures
from fewstep.evaluation.results import Measured

_RANGES = {
    **dict.fromkeys(("precision", "recall", "coverage", "authentic", "memorised"), (0.0, 1.0)),
    "density": (0.0, math.inf),
}


@dataclass(frozen=True)
class Labels:
    """The classes of generated samples ``[M]`` and of the reference's ``[N]`` (None where they are not known)."""

    gen_M: Tensor
    ref_N: Tensor | None
    classes: int


@dataclass(frozen=True)
class Outcome:
    """Metrics by their full names, and the influence of each sample (of recall and coverage: of each reference sample)
    on those that have one: a mean of them is the metric's error, and pairs of them that of a difference. ``heavy``
    names metrics of which a few samples carry most of the variance."""

    metrics: Mapping[str, Measured]
    influences: Mapping[str, Tensor] = field(default_factory=dict)
    heavy: tuple[str, ...] = ()
    per_class: Mapping[str, list[float]] = field(default_factory=dict)


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


def outcome(
    reference: ReferenceFeatures, seen: Everything, *, labels: Labels | None = None, leading: bool = True
) -> Outcome:
    """All metrics of what an extractor has ``seen``. ``labels`` are those that samples were generated from. Whether
    samples are authentic costs another pass and is asked of the ``leading`` features alone.

    A reference without features has no kernel distance and no neighbours.
    """
    found = [_frechet(reference, seen.features, labels)]
    if reference.features is not None and reference.radii is not None:
        found += [_kernel(reference, seen.features), _manifold(reference, seen.features, labels)]
        if reference.extractor.name.startswith("clip"):
            value = cmmd(reference.features, seen.features)
            found.append(Outcome({metric_name("cmmd", reference.extractor.name): Measured(value)}))
        if leading:
            found.append(_authentic(reference, seen.features))
        if reference.held_out is not None:
            found.append(_memorised(reference, seen.features))
    if seen.logits is not None:
        found.append(_classified(reference.extractor.name, seen.logits, labels))
    if seen.spatial is not None and reference.spatial is not None:
        value = frechet_distance(reference.spatial, moments(seen.spatial))
        found.append(Outcome({metric_name("sfid", reference.extractor.name): Measured(value)}))
    return Outcome(
        {name: measured for part in found for name, measured in part.metrics.items()},
        {name: influence for part in found for name, influence in part.influences.items()},
        tuple(name for part in found for name in part.heavy),
        {name: values for part in found for name, values in part.per_class.items()},
    )


def _frechet(reference: ReferenceFeatures, features: Tensor, labels: Labels | None) -> Outcome:
    name = reference.extractor.name
    fd, debiased = metric_name("fd", name), metric_name("fd_debiased", name)
    if len(features) // 2 <= features.shape[1]:  # halves of fewer samples than dimensions follow another law
        return Outcome({fd: Measured(frechet_distance(reference.moments, moments(features)))})
    classes = 1 if labels is None else labels.classes
    quarter = torch.arange(len(features), device=features.device) // classes % 4
    per_class = {} if labels is None else _frechet_per_class(reference, features, labels)
    if int(torch.bincount(quarter, minlength=4).min()) < 2:
        return Outcome({fd: Measured(frechet_distance(reference.moments, moments(features)))}, per_class=per_class)
    split = half_splits([moments(features[quarter == k]) for k in range(4)], reference.moments)
    value, plain = split.value, split.plain
    influence = frechet_influence(reference.moments, split.whole, features, split.gram)
    low, high = interval(value, influence, LEVEL)
    return Outcome(
        {fd: Measured(plain, low, high), debiased: Measured(value, low, high)},
        {debiased: influence},
        (fd, debiased) if heavy(influence) else (),
        per_class,
    )


def _frechet_per_class(reference: ReferenceFeatures, features: Tensor, labels: Labels) -> dict[str, list[float]]:
    """Distances within each class, where all have more samples than dimensions."""
    if reference.features is None or labels.ref_N is None:
        return {}
    least = min(int(torch.bincount(each, minlength=labels.classes).min()) for each in (labels.gen_M, labels.ref_N))
    if least <= features.shape[1]:
        return {}
    ref = moments_per_class(reference.features, labels.ref_N, labels.classes)
    gen = moments_per_class(features, labels.gen_M, labels.classes)
    assert not few_samples(ref, gen)
    return {metric_name("fd", reference.extractor.name): frechet_per_class(ref, gen)}


def _kernel(reference: ReferenceFeatures, features: Tensor) -> Outcome:
    assert reference.features is not None
    name = metric_name("kd", reference.extractor.name)
    means = kernel_means(reference.features, features, ref=reference.kernel_mean)
    influence = kernel_influence_from(means)
    return Outcome(
        {name: Measured(means.distance, *interval(means.distance, influence, LEVEL))},
        {name: influence},
        (name,) if heavy(influence) else (),
    )


def _manifold(reference: ReferenceFeatures, features: Tensor, labels: Labels | None) -> Outcome:
    assert reference.features is not None
    found = manifold_indicators(
        reference.features,
        features,
        k_pr=K_PRECISION_RECALL,
        k_dc=K_DENSITY_COVERAGE,
        ref_radii=reference.radii,
    )
    name = reference.extractor.name
    parts = [
        _mean(metric_name("precision", name), found.precise_M.double(), "precision"),
        _mean(metric_name("recall", name), found.recalled_N.double(), "recall"),
        _mean(metric_name("density", name), found.inside_M.double() / K_DENSITY_COVERAGE, "density"),
        _mean(metric_name("coverage", name), found.covered_N.double(), "coverage"),
    ]
    per_class: dict[str, list[float]] = {}
    if labels is not None:
        per_class[metric_name("precision", name)] = mean_per_class(found.precise_M, labels.gen_M, labels.classes)
        if labels.ref_N is not None:
            per_class[metric_name("recall", name)] = mean_per_class(found.recalled_N, labels.ref_N, labels.classes)
    return Outcome(
        {name: measured for part in parts for name, measured in part.metrics.items()},
        {name: influence for part in parts for name, influence in part.influences.items()},
        per_class=per_class,
    )


def _authentic(reference: ReferenceFeatures, features: Tensor) -> Outcome:
    assert reference.features is not None
    of_each = authentic(features, reference.features, reference.nearest_other).double()
    return _mean(metric_name("authentic", reference.extractor.name), of_each, "authentic")


def _memorised(reference: ReferenceFeatures, features: Tensor) -> Outcome:
    """Beside as many held-out samples as training samples, evenly spaced among these."""
    train, held_out = reference.features, reference.held_out
    assert train is not None
    assert held_out is not None
    rows = torch.arange(len(held_out), device=train.device) * len(train) // len(held_out)
    of_each = nearer_to_training(features, train[rows], held_out)
    return _mean(metric_name("memorised", reference.extractor.name), of_each, "memorised")


def _mean(name: str, influence: Tensor, kind: str) -> Outcome:
    """A metric that is the mean of what each sample says."""
    least, most = _RANGES[kind]
    value = float(influence.mean())
    if not bool(influence.std() > 0):  # none or all of them: a normal interval would be a point
        return Outcome({name: Measured(value)}, {name: influence})
    low, high = interval(value, influence, LEVEL)
    return Outcome({name: Measured(value, max(low, least), min(high, most))}, {name: influence})


def _classified(extractor: str, logits: Tensor, labels: Labels | None) -> Outcome:
    """What a classifier says: its score, and its accuracy where its classes are those of the data."""
    metrics: dict[str, Measured] = {}
    per_class: dict[str, list[float]] = {}
    if len(logits) >= SCORE_PARTS:
        metrics[metric_name("is", extractor)] = Measured(inception_score(logits, SCORE_PARTS)[0])
    if labels is not None and logits.shape[1] == labels.classes:
        name = metric_name("accuracy", extractor)
        metrics[name] = Measured(class_accuracy(logits, labels.gen_M))
        right_M = logits.argmax(1) == labels.gen_M.to(logits.device)
        per_class[name] = mean_per_class(right_M, labels.gen_M, labels.classes)
    return Outcome(metrics, per_class=per_class)


def differences(
    metrics: Mapping[str, Measured],
    influences: Mapping[str, Tensor],
    anchor: Mapping[str, Measured],
    anchor_influences: Mapping[str, Tensor],
) -> dict[str, Measured]:
    """Metrics minus those of another row of the same noise, with the ends of their 95 % interval: of all that both have
    an influence for. Of the Fréchet distance it is the difference of the debiased values: the bias does not cancel."""
    found = {}
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2)
    for name, influence in influences.items():
        other = anchor_influences.get(name)
        if other is None or len(other) != len(influence):
            continue
        value = metrics[name].value - anchor[name].value
        error = reach * paired(influence.double().cpu(), other.double().cpu())
        found[name] = Measured(value, value - error, value + error) if error > 0 else Measured(value)
    return found
