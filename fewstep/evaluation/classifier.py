"""A small residual network that sorts the user's own images into their classes, and the features it does that by.

A folder of ``classifier.safetensors`` and ``classifier.json``, as `fewstep data classifier` writes it, is the extractor
``classifier:FOLDER``. Group norms instead of batch norms: an image's features are its own. Smooth SiLU features keep
responding to images that are nearly, but not quite, right.

Shapes: N images, C channels, H by W pixels, D features, K classes.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.checkpoint import damage_in, read_tensors, write_tensors
from fewstep.errors import UsageError
from fewstep.evaluation.extractor import check_images, extractor_digest, tensors_digest
from fewstep.files import read_json, write_json

CARD, WEIGHTS = "classifier.json", "classifier.safetensors"
FORMAT = 1
FEATURE_DIM = 64
SIDE = 32
WIDTHS = (32, 64, 64)


class ResidualBlock(nn.Module):
    """``x + f(x)`` with two 3x3 convolutions; a 1x1 convolution on the way past where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.past = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.past(x) + self.conv2(F.silu(self.norm2(y)))


class ImageClassifier(nn.Module):
    """uint8 images ``[N, C, H, W]`` of one shape -> features ``[N, D]`` -> logits ``[N, K]``.

    Sides above 32 are reduced to 32 by the means of blocks. Stages of the given widths (multiples of 8), each at half
    the side of the one before, end in a grid of 2 x 2 that is flattened: where a stroke is matters.
    """

    def __init__(
        self, channels: int, num_classes: int, widths: Sequence[int] = WIDTHS, feature_dim: int = FEATURE_DIM
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.widths, self.feature_dim = tuple(widths), feature_dim
        self.stages = nn.ModuleList(ResidualBlock(*pair) for pair in itertools.pairwise((widths[0], *widths)))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.neck = nn.Linear(4 * widths[-1], feature_dim)
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations of uint8 images; a grey level ``u`` enters as ``u / 127.5 - 1``."""
        x = images.float() / 127.5 - 1
        if max(x.shape[2:]) > SIDE:
            x = F.adaptive_avg_pool2d(x, (min(x.shape[2], SIDE), min(x.shape[3], SIDE)))
        x = self.stem(x)
        for number, stage in enumerate(self.stages):
            if number > 0 and min(x.shape[2:]) > 1:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = stage(x)
        x = F.adaptive_avg_pool2d(F.silu(self.norm(x)), 2)
        return F.silu(self.neck(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class ClassifierFeatures:
    """The penultimate layer of a classifier of the user's images, and its class logits. ``card`` is its file's."""

    device: torch.device
    network: ImageClassifier
    shape: tuple[int, ...]
    digest: str
    card: Mapping[str, Any]
    dim: int | None
    name: str = "classifier"
    takes: Literal["uint8", "float"] = "uint8"

    @property
    def facts(self) -> Mapping[str, Any]:
        told = ("dataset", "trained_on", "held_out", "tested_on", "accuracy")
        return {key: self.card[key] for key in told if key in self.card}

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        if images.shape[1:] != self.shape:
            found, trained = ("x".join(map(str, shape)) for shape in (images.shape[1:], self.shape))
            raise UsageError(f"the classifier was trained on images of {trained}, got {found}")
        return self.network.features(images.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        return self.network.head(features)


def write_classifier(folder: Path, network: ImageClassifier, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights and card into a folder; returns the card. ``facts`` has ``shape`` and ``num_classes`` at least."""
    digest = write_tensors(folder / WEIGHTS, dict(network.state_dict()), {"format": "pt"})
    sizes = {"widths": list(network.widths), "feature_dim": network.feature_dim}
    card = {"format": FORMAT, **facts, **sizes, "digest": digest}
    write_json(folder / CARD, card)  # last: a folder with it is complete
    return card


def load_classifier(folder: Path, device: torch.device) -> ClassifierFeatures:
    """The extractor in a folder. What is not there, or damaged, is a ``UsageError``."""
    if not (folder / CARD).is_file():
        raise UsageError(f"no classifier in {folder}: train one with `fewstep data classifier SOURCE --out {folder}`")
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        raise UsageError(f"{folder} is of format {card.get('format')!r}, not {FORMAT}: train it again")
    with damage_in(folder):
        tensors = read_tensors(folder / WEIGHTS, str(card["digest"]))
        shape = tuple(int(side) for side in card["shape"])
        widths = [int(width) for width in card.get("widths", WIDTHS)]
        feature_dim = int(card.get("feature_dim", FEATURE_DIM))
        network = ImageClassifier(shape[0], int(card["num_classes"]), widths, feature_dim)
        network.load_state_dict(tensors)
    network = network.eval().requires_grad_(False)
    text = f"classifier: {'x'.join(map(str, shape))}, u / 127.5 - 1, block means to {SIDE}"
    digest = extractor_digest(text, tensors_digest(tensors).encode())
    return ClassifierFeatures(device, network.to(device), shape, digest, card, feature_dim)
