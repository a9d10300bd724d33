"""The step sweep: every candidate at every step count, on shared seeds, through every metric.

Noise and label of sample ``i`` are functions of (seed, i), so that rows are paired: two rows differ in the model or in
the number of steps and in nothing else. Labels are balanced, ``i mod classes``.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.evaluation.config import EvaluateConfig
from fewstep.evaluation.features import Classifier, FeatureExtractor, class_accuracy, extract, metric_name
from fewstep.evaluation.frechet import Moments, frechet_distance, moments
from fewstep.evaluation.kernel import kernel_distance
from fewstep.evaluation.neighbours import manifold_metrics, radii
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.reference import real_features
from fewstep.evaluation.results import Measured, Row
from fewstep.evaluation.speed import latency_ms
from fewstep.evaluation.strips import samples_strip
from fewstep.evaluation.transport import straightness, straightness_samples, wasserstein2
from fewstep.keys import Key
from fewstep.sampling import FieldSampler, OdeSampler, Sampler

K_PRECISION_RECALL = 3
K_DENSITY_COVERAGE = 5
FLOOR_SPLITS = 4

Seen = Callable[[Row, int, int], None]
"""What hears of a sweep's progress: the new row, how many there are now, how many there will be."""


def unseen(row: Row, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Candidate:
    """A model to be swept: its sampler, the step counts asked for, and what a row says about it."""

    name: str
    role: Literal["teacher", "student"]
    objective: str
    sampler: Sampler
    steps: tuple[int, ...]
    guidance: float
    digest: str
    params: int


@dataclass(frozen=True)
class ReferenceFeatures:
    """One extractor's view of the real data: features, moments and neighbour radii, computed once for all rows."""

    extractor: FeatureExtractor
    features: Tensor
    moments: Moments
    radii: Tensor


@dataclass(frozen=True)
class Drawn:
    """Samples ``x [n, *D]`` with their labels, network evaluations per sample, and the rate they were drawn at."""

    x: Tensor
    label: Tensor | None
    nfe: int
    images_per_s: float


def sweep(
    candidates: Iterable[Candidate],
    data: Dataset,
    extractors: Iterable[FeatureExtractor],
    config: EvaluateConfig,
    *,
    seed: int,
    device: torch.device,
    report: Seen = unseen,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows for every candidate and step count, and the reference they were measured against.

    The teacher's samples at its largest step count are the ones that ``teacher_gap`` (root mean square difference of a
    student's sample to the teacher's from the same noise, in data units) refers to. ``report`` sees each row as it
    comes. A step count outside a student's training is a ``ValueError`` before any sampling starts.
    """
    candidates = sorted(candidates, key=lambda candidate: candidate.role != "teacher")
    for candidate in candidates:
        for steps in candidate.steps:
            candidate.sampler.check(steps)
    references = [reference_features(extractor, data, device) for extractor in extractors]
    total = sum(len(candidate.steps) for candidate in candidates)
    anchor: Tensor | None = None
    rows = []
    for candidate in candidates:
        bent = straightness_of(candidate.sampler, data, seed, device)
        for steps in sorted(candidate.steps, reverse=True):
            drawn = draw(
                candidate.sampler, steps, data, n=config.n, batch_size=config.batch_size, seed=seed, device=device
            )
            if candidate.role == "teacher" and anchor is None:
                anchor = drawn.x
            straight = None if _on_own_nodes(candidate.sampler, steps) else bent
            row = measure(candidate, steps, drawn, references, data, anchor, straight, seed=seed, device=device)
            rows.append(row)
            report(row, len(rows), total)
    rows.sort(key=lambda row: (row.role != "teacher", [c.name for c in candidates].index(row.model), row.steps))
    return rows, describe_reference(references, data, config.n)


def draw(
    sampler: Sampler, steps: int, data: Dataset, *, n: int, batch_size: int, seed: int, device: torch.device
) -> Drawn:
    """Samples ``0 .. n - 1`` of a seed, in batches that change nothing but the speed."""
    parts, labels, rates, nfe = [], [], [], 0
    for indices in torch.arange(n, device=device).split(batch_size):
        noise = sampler.source(Key(seed), "noise", indices, data.shape)
        label = data.drawn_condition(indices)
        _synchronise(device)
        began = time.perf_counter()
        samples = sampler(steps, noise, label, Key(seed), indices)
        _synchronise(device)
        rates.append(len(indices) / (time.perf_counter() - began))
        nfe = samples.nfe
        parts.append(samples.x)
        if isinstance(label, Tensor):
            labels.append(label)
    return Drawn(torch.cat(parts), torch.cat(labels) if labels else None, nfe, statistics.median(rates))


def _labels(data: Dataset) -> str:
    """What samples are generated from, in words."""
    if data.embeddings is not None:
        return "embeddings, i mod rows"
    return "balanced, i mod classes" if data.num_classes else "none"


def straightness_of(sampler: Sampler, data: Dataset, seed: int, device: torch.device) -> float | None:
    """How straight a velocity field's own paths are, from a few of the seed's samples; None for a flow map, and for a
    field that is sampled on nodes of its own."""
    if isinstance(sampler, FieldSampler):
        field = next((each.field for each in sampler.fields if each.steps == 0), None)
    else:
        field = sampler.field if isinstance(sampler, OdeSampler) else None
    if field is None:
        return None
    index = torch.arange(straightness_samples(math.prod(data.shape)), device=device)
    noise = sampler.source(Key(seed), "noise", index, data.shape)
    return straightness(field, noise, data.drawn_condition(index))


def _on_own_nodes(sampler: Sampler, steps: int) -> bool:
    """Whether a field that was made for certain nodes gives the samples: how straight another one is says nothing."""
    return isinstance(sampler, FieldSampler) and sampler.serving(steps).steps != 0


def measure(
    candidate: Candidate,
    steps: int,
    drawn: Drawn,
    references: list[ReferenceFeatures],
    data: Dataset,
    anchor: Tensor | None,
    bent: float | None = None,
    *,
    seed: int,
    device: torch.device,
) -> Row:
    """All metrics of one set of samples, from one pass through each extractor; ``bent`` is its field's straightness."""
    metrics: dict[str, float] = {}
    images = quantised(drawn.x, data)
    for reference in references:
        extractor = reference.extractor
        features = extract(extractor, images if extractor.takes == "uint8" else drawn.x)
        metrics |= compare(reference, features)
        if isinstance(extractor, Classifier) and drawn.label is not None:
            logits = extractor.logits(features)
            metrics[metric_name("accuracy", extractor.name)] = class_accuracy(logits, drawn.label)
        if data.kind == "points":
            metrics[metric_name("w2", extractor.name)] = wasserstein2(reference.features, features)
    if bent is not None:
        metrics["straightness"] = bent
    if candidate.role == "student" and anchor is not None:
        metrics["teacher_gap"] = float((drawn.x.double() - anchor.double()).square().mean().sqrt())
    return Row(
        model=candidate.name,
        role=candidate.role,
        objective=candidate.objective,
        steps=steps,
        nfe=drawn.nfe,
        sampler=candidate.sampler.name,
        guidance=candidate.guidance,
        n=len(drawn.x),
        seed=seed,
        metrics={name: Measured(value) for name, value in metrics.items()},
        latency_ms=latency_ms(candidate.sampler, steps, data, seed=seed, device=device),
        images_per_s=drawn.images_per_s,
        params=candidate.params,
        digest=candidate.digest,
        samples_png=samples_strip(images, data.kind),
    )


def quantised(x: Tensor, data: Dataset) -> Tensor:
    """Images become uint8, once; points stay as they are."""
    return to_uint8(x) if data.kind == "image" else x


def reference_features(extractor: FeatureExtractor, data: Dataset, device: torch.device) -> ReferenceFeatures:
    features = torch.cat(list(real_features(extractor, data, device)))
    return ReferenceFeatures(
        extractor, features, moments(features), radii(features, max(K_PRECISION_RECALL, K_DENSITY_COVERAGE))
    )


def compare(reference: ReferenceFeatures, features: Tensor) -> dict[str, float]:
    """Every distance and manifold metric of generated features against the reference, under their full names."""
    name = reference.extractor.name
    manifold = manifold_metrics(
        reference.features,
        features,
        k_pr=K_PRECISION_RECALL,
        k_dc=K_DENSITY_COVERAGE,
        ref_radii=reference.radii,
    )
    return {
        metric_name("fd", name): frechet_distance(reference.moments, moments(features)),
        metric_name("kd", name): kernel_distance(reference.features, features),
        metric_name("precision", name): manifold.precision,
        metric_name("recall", name): manifold.recall,
        metric_name("density", name): manifold.density,
        metric_name("coverage", name): manifold.coverage,
    }


def describe_reference(references: list[ReferenceFeatures], data: Dataset, n: int) -> dict[str, Any]:
    """The reference block of ``results.json``: data, extractors, conventions, and real data against real data."""
    floor: dict[str, float] = {}
    for reference in references:
        floor |= real_floor(reference, n)
    return {
        "dataset": data.name,
        "n": len(data.x),
        "extractors": {
            reference.extractor.name: {"dim": reference.features.shape[1], "digest": reference.extractor.digest}
            for reference in references
        },
        "floor": floor,
        "protocol": {
            "reference": "the training data themselves",
            "quantisation": "uint8 by (127.5 x + 128), clamped, once"
            if data.kind == "image"
            else f"none ({data.kind})",
            "frechet": "float64, covariance with n - 1, no bias correction",
            "kernel": "unbiased MMD^2, kernel (x.y / D + 1)^3, all pairs",
            "neighbours": f"precision, recall: k = {K_PRECISION_RECALL}; "
            f"density, coverage: k = {K_DENSITY_COVERAGE}; distance <= radius",
            "labels": _labels(data),
            "floor": f"disjoint halves of the real data, mean of {FLOOR_SPLITS} splits; "
            "the Fréchet distance scaled by 1/n_reference + 1/n to the sizes of the rows",
        },
    }


def real_floor(reference: ReferenceFeatures, n: int) -> dict[str, float]:
    """The metrics of real data against other real data: what sampling noise alone costs.

    Means over random splits into two disjoint halves. Between samples of one distribution the expected
    Fréchet distance is ``c (1/n_ref + 1/n)`` to first order, so the halves' value is scaled to ``n`` samples against
    the whole reference; the other metrics stay as the halves gave them.
    """
    everything = torch.arange(len(reference.features))
    half = len(everything) // 2
    k = max(K_PRECISION_RECALL, K_DENSITY_COVERAGE)
    splits = []
    for split in range(FLOOR_SPLITS):
        order = Key(0, split).uniform("floor", everything).argsort(stable=True).to(reference.features.device)
        a, b = reference.features[order[:half]], reference.features[order[half:]]
        splits.append(compare(ReferenceFeatures(reference.extractor, a, moments(a), radii(a, k)), b))
    floor = {name: statistics.mean(values[name] for values in splits) for name in splits[0]}
    rest = len(everything) - half
    distance = metric_name("fd", reference.extractor.name)
    floor[distance] *= (1 / len(everything) + 1 / n) / (1 / half + 1 / rest)
    return floor


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
