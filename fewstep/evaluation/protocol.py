"""The protocol: everything that a number depends on beside the model and how it is sampled. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.errors import UsageError

LEVEL = 0.95
K_PRECISION_RECALL = 3
K_DENSITY_COVERAGE = 5
FLOOR_SPLITS = 4
SCORE_PARTS = 10
REFERENCE_FEATURES = 50_000
"""Of a larger reference the distances between pairs of features see so many, evenly spaced."""


@dataclass(frozen=True)
class Protocol:
    """How numbers were measured, in words and counts. Those of two protocols do not belong in one table.

    What is a row's own (model, digest, sampler, steps, NFE, guidance, average, seed) is in the row, an extractor's
    weights and preprocessing are in its digest, machine and versions are in the report's environment.

    So is the precision of its networks, of which a table has one all the same (``check_same_precision``).

    * ``reference``: what the generated samples were compared with; ``reference_digest`` is that of its content
    * ``n``, ``indices``, ``labels``: how many samples a row is measured on, which, and what they were generated from
    * ``quantisation``, ``features``: from samples to features
    * the other fields: conventions of a kind of metric, as text
    """

    reference: str
    reference_digest: str
    n: int
    labels: str
    quantisation: str
    indices: str = "0 .. n - 1 of the seed, the same in every row"
    features: str = "float32 without TF32 and autocast, each image by itself; moments float64"
    frechet: str = "float64, covariance with n - 1, no bias correction"
    frechet_debiased: str = (
        "2 FD - mean FD of the two halves of three splits by class and index; where a half has more samples than "
        "dimensions"
    )
    kernel: str = "unbiased MMD^2, kernel (x.y / D + 1)^3, all pairs"
    neighbours: str = (
        f"precision, recall: k = {K_PRECISION_RECALL}; density, coverage: k = {K_DENSITY_COVERAGE}; distance <= radius"
    )
    spatial: str = "the Fréchet distance of an early map's values, flattened height, width, channels"
    inception_score: str = f"mean of {SCORE_PARTS} parts in the order of the samples"
    authentic: str = "share whose nearest reference sample has another one nearer; leading features"
    large_reference: str = f"neighbours and kernel see at most {REFERENCE_FEATURES} samples of it, evenly spaced"
    intervals: str = (
        f"{LEVEL:.0%}, given the reference, by the delta method, approximate; of a Fréchet distance around its "
        "debiased value; of precision, recall, density and coverage given the manifold estimate"
    )
    differences: str = "to the teacher's row at most steps (of the same guidance if there is one), paired by sample"
    floor: str = (
        f"disjoint halves of the real data, mean of {FLOOR_SPLITS} splits; "
        "the Fréchet distance scaled by 1/n_reference + 1/n to the sizes of the rows"
    )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()


def check_same_reference(references: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one table were measured against the same data in the same way: else a ``UsageError`` that names the field
    in which they differ, and both values."""
    first = references[0]
    for other in references[1:]:
        for part in ("dataset", "n", "extractors", "protocol"):
            _check_same(f"reference {part}", first.get(part), other.get(part))


def check_same_count(counts: Sequence[frozenset[int]]) -> None:
    """The rows of one table are measured on equally many samples: a distance of fewer is another number."""
    for other in counts[1:]:
        _check_same("n, samples per row,", _listed(counts[0]), _listed(other))


def check_same_precision(precisions: Sequence[frozenset[str]]) -> None:
    """The rows of one table differ in models and steps: in bfloat16 distances and times are another program's. A report
    of no models has none."""
    said = [each for each in precisions if each]
    for other in said[1:]:
        _check_same("precision of the networks", _named(said[0]), _named(other))


def _check_same(name: str, one: Any, another: Any) -> None:
    if one == another:
        return
    if isinstance(one, Mapping) and isinstance(another, Mapping):
        for key in (*one, *(key for key in another if key not in one)):
            _check_same(f"{name}.{key}", one.get(key), another.get(key))
        return
    shown = ["not said" if value is None else repr(value) for value in (one, another)]
    raise UsageError(f"these results do not compare: {name} is {shown[0]} in one and {shown[1]} in another")


def _named(precisions: frozenset[str]) -> str:
    return ", ".join(sorted(precisions))


def _listed(counts: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(counts)))
