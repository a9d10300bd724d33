"""Reference statistics in a file, ``*.refstats.safetensors``: computed once, used by every evaluation.

Tensors ``mean [D]``, ``cov [D, D]``, ``factor [D, R]`` (float64), ``features [N, D]`` and ``radii [N, K]`` (float32),
``label [N]`` where there are classes, ``spatial_mean`` and ``spatial_cov`` where the extractor has a map. What they are
of and how they were made is in the metadata. Nothing in such a file can run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.checkpoint import write_tensors
from fewstep.errors import UsageError
from fewstep.evaluation.extractor import FeatureExtractor
from fewstep.evaluation.frechet import Moments
from fewstep.evaluation.protocol import K_DENSITY_COVERAGE, K_PRECISION_RECALL
from fewstep.evaluation.reference import K, ReferenceFeatures

SUFFIX = ".refstats.safetensors"
FORMAT = "fewstep reference statistics 1"


def write_refstats(path: Path, reference: ReferenceFeatures, *, dataset: str, dataset_digest: str, kind: str) -> None:
    """Write a reference with its neighbours, and of what it is: a data set by name and content digest, and its kind."""
    tensors = {"mean": reference.moments.mean, "cov": reference.moments.cov, "factor": reference.moments.factor}
    if reference.features is not None and reference.radii is not None:
        tensors |= {"features": reference.features, "radii": reference.radii}
        tensors |= {} if reference.label is None else {"label": reference.label}
    if reference.spatial is not None:
        tensors |= {"spatial_mean": reference.spatial.mean, "spatial_cov": reference.spatial.cov}
    facts = {
        "format": FORMAT,
        "extractor": reference.extractor.name,
        "extractor_digest": reference.extractor.digest,
        "dataset": dataset,
        "dataset_digest": dataset_digest,
        "kind": kind,
        "n": reference.moments.n,
        "k": {"precision, recall": K_PRECISION_RECALL, "density, coverage": K_DENSITY_COVERAGE, "radii": K},
        "covariance": "n - 1",
        "quantisation": "uint8" if reference.extractor.takes == "uint8" else "none",
    }
    write_tensors(path, tensors, {"facts": json.dumps(facts, sort_keys=True)})


def refstats_facts(path: Path) -> dict[str, Any]:
    """What a file of statistics says of itself. Anything else is a ``UsageError``."""
    return _read(path)[0]


def read_refstats(path: Path, extractor: FeatureExtractor, device: torch.device) -> ReferenceFeatures:
    """The reference that a file holds, for the extractor that it was made with: another one, or one with other weights
    or preprocessing, is a ``UsageError`` that names both."""
    facts, tensors = _read(path)
    for field, ours in (("extractor", extractor.name), ("extractor_digest", extractor.digest)):
        if facts.get(field) != ours:
            raise UsageError(
                f"{path} was made with another {field}: {facts.get(field)}, and this evaluation has {ours}"
            )
    try:
        n, names = int(facts["n"]), ("dataset", "dataset_digest", "kind")
        said = {name: str(facts[name]) for name in names}
        found = Moments(tensors["mean"].to(device), tensors["cov"].to(device), n)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if "factor" in tensors:  # as the cached property would have it
        found.__dict__["factor"] = tensors["factor"].to(device)
    spatial = None
    if "spatial_mean" in tensors and "spatial_cov" in tensors:
        spatial = Moments(tensors["spatial_mean"].to(device), tensors["spatial_cov"].to(device), n)
    features, radii = tensors.get("features"), tensors.get("radii")
    if radii is not None and radii.shape[1] < K:
        features = radii = None
    return ReferenceFeatures(
        extractor,
        None if features is None else features.to(device),
        found,
        None if radii is None else radii.to(device),
        {"dataset": said["dataset"], "digest": said["dataset_digest"], "kind": said["kind"], "n": n, "imported": False},
        spatial,
        label=None if features is None or "label" not in tensors else tensors["label"].to(device),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"no {path}: `fewstep data stats DATA --features NAME --out {path.name}` writes it")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            names = list(file.keys())
            tensors = {key: file.get_tensor(key) for key in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UsageError(f"{path} holds no reference statistics, or those of another version: make it again")
    return facts, tensors


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} is damaged or cut short: {type(error).__name__}: {error}")
