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
from fewstep.evaluation.extractor import Everything, FeatureExtractor, Fitted
from fewstep.evaluation.features import extract, extract_everything, fitted
from fewstep.evaluation.frechet import Moments, merge, moments
from fewstep.evaluation.kernel import kernel_mean
from fewstep.evaluation.memorisation import nearest_other
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
    for all rows. Statistics of other projects have moments alone. ``spatial`` are moments of an early map, where the
    extractor has one. ``label`` are the classes of the features ``[N]`` where there are classes, ``rows`` the places
    ``[N]`` of their images in the data, None where these are not at hand. ``facts`` says what they are of, where that
    is not the data at hand: ``dataset``, ``n``, ``digest``, ``imported``. ``held_out`` are features of data that no
    model has seen."""

    extractor: FeatureExtractor
    features: Tensor | None
    moments: Moments
    radii: Tensor | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    spatial: Moments | None = None
    rows: Tensor | None = None
    label: Tensor | None = None
    held_out: Tensor | None = None

    @cached_property
    def kernel_mean(self) -> float:
        """The mean kernel over pairs of different features."""
        assert self.features is not None
        return kernel_mean(self.features)

    @cached_property
    def nearest_other(self) -> Tensor:
        """Distance ``[N]`` of each feature to the nearest other one."""
        assert self.features is not None
        return nearest_other(self.features)


def reference_features(
    extractor: FeatureExtractor, data: Dataset, device: torch.device, share: Share = ALONE
) -> ReferenceFeatures:
    """The reference that a data set is: moments of all samples, features and radii of at most ``REFERENCE_FEATURES``,
    evenly spaced. Each process reads its share of the data. An extractor that is made for a reference is made for this
    one, from those features."""
    count = len(data.x)
    few = torch.arange(min(count, REFERENCE_FEATURES)) * count // min(count, REFERENCE_FEATURES)
    if isinstance(extractor, Fitted):
        raw = _gathered(extractor, data, few, device, share).features
        extractor = fitted(extractor, raw)
        check_takes(extractor, data)
    found = _gathered(extractor, data, few, device, share)
    spatial = None if found.spatial is None else moments(found.spatial)
    if count == len(few):
        whole = moments(found.features)
    else:
        rows, own = share.own(count)
        parts = (_everything(extractor, data, part, device) for part in rows[:own].split(_BLOCK))
        whole, spatial = _streamed_everything(parts)
        whole = _merged(whole, share)
        spatial = None if spatial is None else _merged(spatial, share)
    label = None if data.label is None or not data.num_classes else data.label[few].to(device)
    return ReferenceFeatures(extractor, found.features, whole, radii(found.features, K), {}, spatial, few, label)


def _gathered(
    extractor: FeatureExtractor, data: Dataset, rows: Tensor, device: torch.device, share: Share
) -> Everything:
    """Features and spatial maps of some rows of the data, from all processes."""
    place, own = share.own(len(rows))
    parts = [_everything(extractor, data, part, device) for part in rows[place[:own]].split(_BLOCK)]
    features = share.gather(torch.cat([part.features for part in parts]), len(rows))
    maps = [part.spatial for part in parts if part.spatial is not None]
    return Everything(features, None, share.gather(torch.cat(maps), len(rows)) if maps else None)


def _streamed_everything(parts: Iterator[Everything]) -> tuple[Moments, Moments | None]:
    whole: Moments | None = None
    spatial: Moments | None = None
    for part in parts:
        whole = _added(whole, part.features)
        spatial = None if part.spatial is None else _added(spatial, part.spatial)
    assert whole is not None
    return whole, spatial


def _merged(own: Moments, share: Share) -> Moments:
    """The moments of all processes together, the same on each."""
    whole: Moments | None = None
    for mean, cov, n in share.everyone((own.mean.cpu(), own.cov.cpu(), own.n)):
        part = Moments(mean.to(own.mean), cov.to(own.mean), n)
        whole = part if whole is None else merge(whole, part)
    assert whole is not None
    return whole


def held_out_features(reference: ReferenceFeatures, data: Dataset, device: torch.device) -> Tensor:
    """The features ``[N, D]`` of data that no model has seen, at most as many as the reference has."""
    count = len(data.x)
    kept = min(count, REFERENCE_FEATURES if reference.features is None else len(reference.features))
    rows = torch.arange(kept) * count // kept
    return torch.cat([_features(reference.extractor, data, part, device) for part in rows.split(_BLOCK)])


def real_features(extractor: FeatureExtractor, data: Dataset, device: torch.device) -> Iterator[Tensor]:
    """Features of all samples of a data set in their order, some thousand rows ``[n, D]`` at a time."""
    for rows in torch.arange(len(data.x)).split(_BLOCK):
        yield _features(extractor, data, rows, device)


def _features(extractor: FeatureExtractor, data: Dataset, rows: Tensor, device: torch.device) -> Tensor:
    return tiled_features(extractor, _seen(extractor, data, rows, device))


def _everything(extractor: FeatureExtractor, data: Dataset, rows: Tensor, device: torch.device) -> Everything:
    return tiled_everything(extractor, _seen(extractor, data, rows, device))


def _seen(extractor: FeatureExtractor, data: Dataset, rows: Tensor, device: torch.device) -> Tensor:
    real = data.samples(rows).to(device)
    return to_uint8(real) if extractor.takes == "uint8" else real


def tiled_features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Features ``[N, D]`` of ``images [N, ...]``, the last batch filled up to a tile with further copies of the last
    image: how many there are changes no row's rounding."""
    return extract(extractor, _tiled(images))[: len(images)]


def tiled_everything(extractor: FeatureExtractor, images: Tensor) -> Everything:
    """The same with the logits and the spatial map of an extractor that has them."""
    found = extract_everything(extractor, _tiled(images))
    logits, spatial = (None if part is None else part[: len(images)] for part in (found.logits, found.spatial))
    return Everything(found.features[: len(images)], logits, spatial)


def _tiled(images: Tensor) -> Tensor:
    missing = -len(images) % TILE
    return torch.cat((images, images[-1:].expand(missing, *images.shape[1:]))) if missing else images


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


def _streamed(blocks: Iterator[Tensor], report: Callable[[int], None]) -> Moments:
    whole: Moments | None = None
    for block in blocks:
        whole = _added(whole, block)
        report(whole.n)
    assert whole is not None
    return whole


def _added(whole: Moments | None, block: Tensor) -> Moments:
    if len(block) > 1:
        part = moments(block)
    else:  # the last sample by itself
        one = block[0].double()
        part = Moments(one, torch.zeros(len(one), len(one), dtype=one.dtype, device=one.device), 1)
    return part if whole is None else merge(whole, part)


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
