"""What features say of samples beyond distances and manifolds: scores of classifiers, copies of data, single classes.

Shapes: N reference samples, M generated ones, D features, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation.cmmd import cmmd
from fewstep.evaluation.features import Classifier, class_accuracy, metric_name
from fewstep.evaluation.inception_score import inception_score
from fewstep.evaluation.memorisation import authentic_share, memorised_share, nearest
from fewstep.evaluation.per_class import few_samples, frechet_per_class, mean_per_class, moments_per_class
from fewstep.evaluation.reference import ReferenceFeatures, reference_rows
from fewstep.evaluation.results import Measured

PARTS = 10
"""Of an Inception score."""


@dataclass(frozen=True)
class Further:
    """Metrics by their full names, and of each class by itself."""

    metrics: Mapping[str, Measured] = field(default_factory=dict)
    per_class: Mapping[str, list[float]] = field(default_factory=dict)


def further(
    reference: ReferenceFeatures,
    features: Tensor,
    label_M: Tensor | None,
    data: Dataset,
    influences: Mapping[str, Tensor],
) -> Further:
    """Of features ``[M, D]``, whose labels are None where there are none; ``influences`` are those of ``outcome``.

    The Inception score of any classifier, and how often it agrees with the labels if they are its classes; CMMD on
    CLIP's features; with held-out data, shares of memorised and of authentic samples; the Fréchet distance within each
    class where every class has more samples than dimensions, and each class's recall.
    """
    extractor, name = reference.extractor, reference.extractor.name
    metrics: dict[str, Measured] = {}
    per_class: dict[str, list[float]] = {}
    classes = data.num_classes
    if isinstance(extractor, Classifier):
        logits = extractor.logits(features)
        if len(logits) >= PARTS:
            metrics[metric_name("is", name)] = Measured(inception_score(logits, PARTS)[0])
        if label_M is not None and logits.shape[1] == classes:  # it knows these classes
            right = logits.argmax(1) == label_M.to(logits.device)
            metrics[metric_name("accuracy", name)] = Measured(class_accuracy(logits, label_M))
            per_class[metric_name("accuracy", name)] = mean_per_class(right.double(), label_M, classes)
    if reference.features is None:
        return Further(metrics, per_class)
    if name.startswith("clip"):
        metrics["cmmd" if name == "clip" else metric_name("cmmd", name)] = Measured(cmmd(reference.features, features))
    if reference.held_out is not None:
        held_out, train = reference.held_out, reference.features
        count = min(len(held_out), len(train))
        rows = torch.arange(count, device=train.device) * len(train) // count  # as many of each, evenly spaced
        memorised = memorised_share(features, train[rows], held_out[:count])
        metrics[metric_name("memorised", name)] = Measured(memorised)
        authentic = authentic_share(features, train, reference.apart)
        metrics[metric_name("authentic", name)] = Measured(authentic)
    if label_M is not None and data.label is not None and not reference.facts:
        label_N = data.label[reference_rows(len(data.x))].to(features.device)
        real = moments_per_class(reference.features, label_N, classes)
        drawn = moments_per_class(features, label_M, classes)
        if not few_samples(real, drawn):
            per_class[metric_name("fd", name)] = frechet_per_class(real, drawn)
        recall = metric_name("recall", name)
        if recall in influences:
            per_class[recall] = mean_per_class(influences[recall].to(label_N.device), label_N, classes)
    return Further(metrics, per_class)


def nearest_training_images(reference: ReferenceFeatures, features: Tensor, data: Dataset) -> Tensor | None:
    """The samples of the data nearest to each of some features ``[m, D]``, ``[m, *D]`` float32; None where the
    reference is not the data at hand."""
    if reference.features is None or reference.facts or len(features) < 2:
        return None
    _, index = nearest(features, reference.features)
    return data.samples(reference_rows(len(data.x))[index.cpu()])
