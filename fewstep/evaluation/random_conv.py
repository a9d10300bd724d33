"""Features of random convolutions: they need no weights and no training, and are the same on every machine.

Three stages of a 3x3 convolution and a ReLU, with 2x2 average pooling between them; each stage gives the mean and the
standard deviation of its channels over the image. Random filters tell textures and edges apart, not meanings: good for
comparing runs on data that no pretrained network knows, and not comparable with FID.

Shapes: N images, C channels, H by W pixels.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.evaluation.extractor import check_images, extractor_digest
from fewstep.keys import Key

SEED = 0
WIDTHS = (32, 64, 64)
_TEXT = (
    f"random_conv: seed {SEED}, widths {WIDTHS}, u / 127.5 - 1, borders repeated, 2x2 means between, "
    "relu, means and standard deviations"
)


@dataclass(frozen=True)
class RandomConv:
    """Means and standard deviations of random channels, ``[N, 320]``. Filters are Gaussian with the variance
    2 / (9 C) that keeps a ReLU's scale, drawn for the images' own number of channels."""

    device: torch.device
    name: str = "random_conv"
    dim: int | None = 2 * sum(WIDTHS)
    digest: str = extractor_digest(_TEXT)
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        x = images.to(self.device).float() / 127.5 - 1
        features = []
        for stage, filters in enumerate(_filters(x.shape[1])):
            if stage > 0:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), filters.to(self.device)))
            features += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        return torch.cat(features, 1)


@cache
def _filters(channels: int) -> tuple[Tensor, ...]:
    """Filters ``[outputs, inputs, 3, 3]`` of every stage for images of so many channels."""
    widths = (channels, *WIDTHS)
    return tuple(
        Key(SEED, stage).normal("random_conv", torch.arange(outputs), (inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5
        for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    )
