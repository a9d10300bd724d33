"""Features of real data, and their Gaussian statistics in a file that other tools read as well.

Shapes: N samples, D features.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.errors import UsageError
from fewstep.evaluation.features import FeatureExtractor, extract
from fewstep.evaluation.frechet import Moments, merge, moments
from fewstep.evaluation.quantise import to_uint8
from fewstep.files import write_atomic

_BLOCK = 4096  # real samples decoded at a time; a multiple of the batches that features are extracted in


def real_features(extractor: FeatureExtractor, data: Dataset, device: torch.device) -> Iterator[Tensor]:
    """Features of all samples of a data set in their order, some thousand rows ``[n, D]`` at a time."""
    for rows in torch.arange(len(data.x)).split(_BLOCK):
        real = data.samples(rows).to(device)
        yield extract(extractor, to_uint8(real) if extractor.takes == "uint8" else real)


def feature_moments(
    extractor: FeatureExtractor,
    data: Dataset,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Moments:
    """Mean and covariance of the features of a whole data set, which are never all in memory."""
    check_takes(extractor, data)
    if len(data.x) < 2:
        raise UsageError(f"{data.name} has one sample: a covariance needs two")
    whole: Moments | None = None
    for block in real_features(extractor, data, device):
        if len(block) > 1:
            part = moments(block)
        else:  # the last sample by itself
            one = block[0].double()
            part = Moments(one, torch.zeros(len(one), len(one), dtype=one.dtype, device=one.device), 1)
        whole = part if whole is None else merge(whole, part)
        report(whole.n, len(data.x))
    assert whole is not None
    return whole


def check_takes(extractor: FeatureExtractor, data: Dataset) -> None:
    """``UsageError`` where features of images are asked of data that are none."""
    if data.kind != "image" and extractor.takes == "uint8":
        raise UsageError(f"{extractor.name} features take images and {data.name} has {data.kind}: use identity")


def write_statistics(path: Path, found: Moments, facts: Mapping[str, str]) -> None:
    """Write ``mu [D]``, ``sigma [D, D]`` (float64, the keys of EDM and pytorch-fid), ``n`` and facts as an npz file."""
    buffer = io.BytesIO()
    arrays = {"mu": found.mean.cpu().numpy(), "sigma": found.cov.cpu().numpy(), "n": np.int64(found.n)}
    np.savez(buffer, **arrays, **{key: np.str_(value) for key, value in facts.items()})  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())
