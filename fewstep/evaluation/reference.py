"""What generated samples are compared with: features of real data, their statistics, and real data against real data.

Shapes: N samples, D features.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset
from fewstep.errors import UsageError
from fewstep.evaluation.features import FeatureExtractor, extract
from fewstep.evaluation.frechet import Moments, merge, moments
from fewstep.evaluation.kernel import kernel_mean
from fewstep.evaluation.neighbours import radii
from fewstep.evaluation.protocol import K_DENSITY_COVERAGE, K_PRECISION_RECALL, REFERENCE_FEATURES
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.share import ALONE, Share
from fewstep.files import write_atomic

TILE = 64
"""Networks are called on multiples of this many rows: a few other sizes round otherwise (see ``draw``)."""

K = max(K_PRECISION_RECALL, K_DENSITY_COVERAGE)
_BLOCK = 4096  # real samples decoded at a time; a multiple of the batches that features are extracted in


@dataclass(frozen=True)
class ReferenceFeatures:
    """One extractor's view of the reference: features ``[N, D]``, moments and neighbour radii ``[N, K]``, computed once
    for all rows. Statistics of other projects have moments alone. ``facts`` says what they are of, where that is not
    the data at hand: ``dataset``, ``n``, ``digest``, ``imported``."""

    extractor: FeatureExtractor
    features: Tensor | None
    moments: Moments
    radii: Tensor | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def kernel_mean(self) -> float:
        """The part of every kernel distance that is the reference's alone."""
        assert self.features is not None
        return kernel_mean(self.features)


def reference_features(
    extractor: FeatureExtractor, data: Dataset, device: torch.device, share: Share = ALONE
) -> ReferenceFeatures:
    """The reference that a data set is: moments of all samples, features and radii of at most ``REFERENCE_FEATURES``,
    evenly spaced. Each process reads its share of the data."""
    count = len(data.x)
    few = torch.arange(min(count, REFERENCE_FEATURES)) * count // min(count, REFERENCE_FEATURES)
    place, own = share.own(len(few))
    parts = [_features(extractor, data, rows, device) for rows in few[place[:own]].split(_BLOCK)]
    features = share.gather(torch.cat(parts), len(few))
    if count == len(few):
        return ReferenceFeatures(extractor, features, moments(features), radii(features, K))
    rows, own = share.own(count)
    streamed = _streamed(_features(extractor, data, part, device) for part in rows[:own].split(_BLOCK))
    whole = streamed
    for rank, other in enumerate(share.everyone((streamed.mean.cpu(), streamed.cov.cpu(), streamed.n))):
        part = Moments(other[0].to(whole.mean), other[1].to(whole.mean), other[2])
        whole = part if rank == 0 else merge(whole, part)
    return ReferenceFeatures(extractor, features, whole, radii(features, K))


def real_features(extractor: FeatureExtractor, data: Dataset, device: torch.device) -> Iterator[Tensor]:
    """Features of all samples of a data set in their order, some thousand rows ``[n, D]`` at a time."""
    for rows in torch.arange(len(data.x)).split(_BLOCK):
        yield _features(extractor, data, rows, device)


def _features(extractor: FeatureExtractor, data: Dataset, rows: Tensor, device: torch.device) -> Tensor:
    real = data.samples(rows).to(device)
    return tiled_features(extractor, to_uint8(real) if extractor.takes == "uint8" else real)


def tiled_features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features ``[N, D]`` of ``images [N, ...]``, the last batch filled up to a tile with further copies of the last
    image: how many there are changes no row's rounding."""
    missing = -len(images) % TILE
    filled = torch.cat((images, images[-1:].expand(missing, *images.shape[1:]))) if missing else images
    return extract(extractor, filled)[: len(images)]


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
    return _streamed(real_features(extractor, data, device), lambda done: report(done, len(data.x)))


def _streamed(blocks: Iterator[Tensor], report: Callable[[int], None] = lambda done: None) -> Moments:
    whole: Moments | None = None
    for block in blocks:
        if len(block) > 1:
            part = moments(block)
        else:  # the last sample by itself
            one = block[0].double()
            part = Moments(one, torch.zeros(len(one), len(one), dtype=one.dtype, device=one.device), 1)
        whole = part if whole is None else merge(whole, part)
        report(whole.n)
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
