"""What a data set is, and whether all of it can be read."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.data.config import DataConfig, LatentsConfig, ShardsConfig
from fewstep.data.dataset import LatentScale
from fewstep.data.digests import ContentDigest
from fewstep.data.encoded import Reported, unreported
from fewstep.data.paths import expanded
from fewstep.data.shards import META, verify
from fewstep.data.stream import Run, stream


@dataclass(frozen=True)
class Inspection:
    """A data set that was read from front to end.

    ``stored`` is images, latents or samples, ``shape`` the shape of one as it is stored, ``low`` and ``high`` the
    smallest and largest stored value. ``mean`` and ``std`` are per channel, of samples as training sees them, and
    ``digest`` is that of the content (see ``digests``).
    """

    name: str
    kind: str
    path: str
    stored: str
    count: int
    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(config: DataConfig, report: Reported = unreported) -> Inspection:
    """Read all data of a config, shards' digests included. The first fault is the ``UsageError`` of a training."""
    if isinstance(config, ShardsConfig | LatentsConfig) and (expanded(config.path) / META).is_file():
        verify(expanded(config.path))
    data = stream(config, report)
    content, channels = ContentDigest(), _Channels(data.latent)
    counts = torch.zeros(data.num_classes, dtype=torch.int64)
    skipped: list[str] = []
    count, lows, highs = 0, [], []
    shape: tuple[int, ...] = ()
    for run in data.runs:
        skipped += run.skipped
        if not len(run.x):
            continue
        content.add(run.x, run.label, run.mirrored)
        channels.add(run)
        if run.label is not None:
            counts += torch.bincount(run.label, minlength=data.num_classes)
        count, shape = count + len(run.x), tuple(run.x.shape[1:])
        lows.append(float(run.x.min()))
        highs.append(float(run.x.max()))
    mean, std = channels.result()
    return Inspection(
        name=data.name,
        kind=config.kind,
        path=data.where,
        stored=data.key,
        count=count,
        shape=shape,
        num_classes=data.num_classes,
        class_names=data.class_names,
        class_counts=tuple(counts.tolist()),
        low=min(lows),
        high=max(highs),
        mean=mean,
        std=std,
        skipped=tuple(skipped),
        digest=content.result(data.num_classes, data.latent),
    )


class _Channels:
    """Sums for the mean and the standard deviation of each channel, in float64."""

    def __init__(self, latent: LatentScale | None) -> None:
        self._latent = latent
        self._count = 0
        self._first: Tensor | float = 0.0
        self._second: Tensor | float = 0.0

    def add(self, run: Run) -> None:
        x = run.x.double()
        if self._latent is not None:
            mean, variance = self._latent.distribution(x)
        elif run.x.dtype == torch.uint8:
            mean, variance = x / 127.5 - 1, torch.zeros(())
        else:
            mean, variance = x, torch.zeros(())
        mean, second = _by_channel(mean), _by_channel(mean.square() + variance)
        self._count += mean.shape[1]
        self._first = self._first + mean.sum(1)
        self._second = self._second + second.sum(1)

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = torch.as_tensor(self._first) / self._count
        std = (torch.as_tensor(self._second) / self._count - mean.square()).clamp(min=0).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())


def _by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)
