"""Any data set read once from front to end: what writing, inspecting and measuring it share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewstep.data.config import DataConfig, ImagesConfig
from fewstep.data.dataset import Dataset, LatentScale
from fewstep.data.encoded import Reported, labels_of, pieces, unreported
from fewstep.data.load import data_name, load_data, open_images

_BLOCK = 1024


@dataclass(frozen=True)
class Run:
    """Consecutive samples as they are stored, ``x [n, ...]``, with their labels ``[n]``, the latents of the mirrored
    images, and the names of broken images among them."""

    x: Tensor
    label: Tensor | None
    mirrored: Tensor | None = None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """``runs`` of a data set, and what is known before. ``key`` says what is stored: images, latents, or samples.

    ``count`` includes images that may turn out broken.
    """

    name: str
    where: str
    key: str
    count: int
    num_classes: int
    runs: Iterator[Run]
    class_names: tuple[str, ...] = ()
    latent: LatentScale | None = None
    has_mirrored: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        return self.num_classes > 0


def stream(config: DataConfig, report: Reported = unreported) -> Stream:
    """Open the data of a config. Encoded images are decoded as the runs are asked for, a few at a time."""
    if not isinstance(config, ImagesConfig):
        return stream_of(load_data(config), getattr(config, "path", config.kind), report)
    encoded = open_images(config)
    label, num_classes = labels_of(encoded, config)

    def runs() -> Iterator[Run]:
        if encoded.missing:
            yield Run(torch.empty(0, dtype=torch.uint8), None, skipped=encoded.missing)
        for piece in pieces(encoded, config, report):
            yield Run(piece.x, None if label is None else label[piece.rows], skipped=piece.skipped)

    count = min(len(encoded.names), config.max_images or len(encoded.names))
    class_names = encoded.class_names if num_classes else ()
    return Stream(data_name(config), encoded.where, "images", count, num_classes, runs(), class_names)


def stream_of(data: Dataset, where: str, report: Reported = unreported) -> Stream:
    """A data set that is loaded or mapped already."""

    def runs() -> Iterator[Run]:
        for rows in torch.arange(len(data.x)).split(_BLOCK):
            label = None if data.label is None else data.label[rows]
            yield Run(data.x[rows], label, None if data.mirrored is None else data.mirrored[rows])
            report(int(rows[-1]) + 1, len(data.x))

    key = "latents" if data.latent is not None else "images" if data.x.dtype == torch.uint8 else "samples"
    return Stream(
        data.name,
        where,
        key,
        len(data.x),
        data.num_classes,
        runs(),
        data.class_names,
        data.latent,
        has_mirrored=data.mirrored is not None,
        facts=data.facts,
    )
