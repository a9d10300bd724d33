"""The references of an evaluation that lie in files, each for the extractor that it is for."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.errors import UsageError
from fewstep.evaluation.extractor import FeatureExtractor
from fewstep.evaluation.imported import imported_reference, metric_key, read_imported, serves
from fewstep.evaluation.reference import ReferenceFeatures
from fewstep.evaluation.refstats import SUFFIX, read_refstats, refstats_facts


def known_references(
    paths: Sequence[Path], extractors: Sequence[FeatureExtractor], shape: tuple[int, ...], device: torch.device
) -> list[ReferenceFeatures]:
    """What the files hold. ``shape`` is that of a sample, whose size is the dimension of features that have none of
    their own. A file that fits no extractor, or the same as another, is a ``UsageError``."""
    named = {extractor.name: extractor for extractor in extractors}
    found: dict[str, ReferenceFeatures] = {}
    for path in paths:
        if path.name.endswith(SUFFIX):
            name = str(refstats_facts(path).get("extractor"))
            if name not in named:
                raise UsageError(f"{path} is of {name} features, and this evaluation has {', '.join(named)}")
            reference = read_refstats(path, named[name], device)
        elif path.suffix in (".npz", ".pkl"):
            metric = next((metric_key(name) for name in named if metric_key(name) != name), "fid")
            imported = read_imported(path, metric)
            sizes = {name: each.dim or int(torch.Size(shape).numel()) for name, each in named.items()}
            name = serves(imported, sizes)
            reference = imported_reference(imported, named[name], device)
        else:
            raise UsageError(f"{path} is no file of reference statistics: {SUFFIX}, .npz (mu, sigma) or .pkl")
        if name in found:
            raise UsageError(f"{path} is the second file for {name} features")
        found[name] = reference
    return list(found.values())
