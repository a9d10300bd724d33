"""Features of the Inception network, by the three preprocessings that published numbers were made with.

=====================  ==========================================================  ==================
name                   resize to 299 x 299                                         scaling of u
=====================  ==========================================================  ==================
inception              bicubic with antialiasing ("clean", Parmar et al.           (u - 128) / 128
                       2104.11222)
inception_tensorflow   bilinear without antialiasing on TensorFlow 1's grid        (u - 128) / 128
inception_pytorch      bilinear without antialiasing, pixel centres aligned        2 (u / 255) - 1
=====================  ==========================================================  ==================

Shapes: N images, H by W pixels.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.evaluation.extractor import Everything, as_colour, extractor_digest
from fewstep.evaluation.inception import FEATURES, SIZE, InceptionNetwork, inception_network
from fewstep.evaluation.weights import INCEPTION_FILES, WeightsFile, load_weights


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 images ``[N, 3, H, W]`` to the network's input ``[N, 3, 299, 299]`` float32, and the same in words."""

    resize: Callable[[Tensor, int], Tensor]
    scale: Callable[[Tensor], Tensor]
    text: str

    def __call__(self, images: Tensor) -> Tensor:
        return self.scale(self.resize(images, SIZE))


def resize_clean(images: Tensor, size: int) -> Tensor:
    """uint8 ``[N, C, H, W]`` to float32 ``[N, C, size, size]`` in [0, 255], not quantised again.

    Bicubic with antialiasing is PIL's filter (a = -1/2) to within 0.002 grey levels. Without antialiasing torch uses
    another cubic (a = -3/4), which is wrong even when it enlarges.
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


def resize_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: the same shapes, pixel ``i`` taken at ``i * source / size``, no antialiasing."""
    x = images.float()
    low, high, part = _grid(x.shape[3], size, x.device)
    left, right = x[..., low], x[..., high]
    x = left + (right - left) * part
    low, high, part = _grid(x.shape[2], size, x.device)
    top, bottom = x[:, :, low], x[:, :, high]
    return top + (bottom - top) * part[:, None]


def _grid(source: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower neighbour, upper neighbour and the share of the upper one, each ``[size]``."""
    at = torch.arange(size, dtype=torch.float32, device=device) * torch.tensor(source / size, dtype=torch.float32)
    low = at.long()
    return low, (low + 1).clamp_max(source - 1), at - low


def resize_pytorch(images: Tensor, size: int) -> Tensor:
    """Bilinear as ``F.interpolate`` does it without antialiasing: the same shapes."""
    return F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)


def _around_128(u: Tensor) -> Tensor:
    return (u - 128) / 128


def _to_one(u: Tensor) -> Tensor:
    return 2 * (u / 255) - 1


PREPROCESSINGS: Mapping[str, Preprocessing] = {
    "inception": Preprocessing(resize_clean, _around_128, "inception clean: bicubic antialias 299, (u - 128) / 128"),
    "inception_tensorflow": Preprocessing(
        resize_tensorflow, _around_128, "inception tensorflow: bilinear of TensorFlow 1 to 299, (u - 128) / 128"
    ),
    "inception_pytorch": Preprocessing(resize_pytorch, _to_one, "inception pytorch: bilinear 299, 2 (u / 255) - 1"),
}


@dataclass(frozen=True)
class Inception:
    """The 2048 pooled features that FID is defined on, 1008 class logits, and the spatial map of sFID."""

    device: torch.device
    network: InceptionNetwork
    preprocessing: Preprocessing
    name: str
    digest: str
    weights: str
    """Which file they came from."""
    dim: int | None = FEATURES
    takes: Literal["uint8", "float"] = "uint8"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"preprocessing": self.preprocessing.text, "weights": self.weights}

    def __call__(self, images: Tensor) -> Tensor:
        return self._run(images)[0]

    def spatial(self, images: Tensor) -> Tensor:
        return self._run(images)[1]

    def everything(self, images: Tensor) -> Everything:
        features, spatial = self._run(images)
        return Everything(features, self.logits(features), spatial)

    def logits(self, features: Tensor) -> Tensor:
        """Features ``[N, 2048]`` -> logits ``[N, 1008]`` without the bias."""
        return self.network.logits(features)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(self.preprocessing(as_colour(images.to(self.device), self.name)))


@dataclass(frozen=True)
class TorchScriptInception:
    """The 2048 pooled features alone, from the TorchScript file: for machines that have no other."""

    device: torch.device
    network: Any
    preprocessing: Preprocessing
    name: str
    digest: str
    weights: str
    dim: int | None = FEATURES
    takes: Literal["uint8", "float"] = "uint8"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"preprocessing": self.preprocessing.text, "weights": self.weights}

    def __call__(self, images: Tensor) -> Tensor:
        x = self.preprocessing(as_colour(images.to(self.device), self.name))
        return self.network.layers(x).reshape(len(x), FEATURES).float()


def load_inception(
    name: str, device: torch.device, weights: Path | None, files: tuple[WeightsFile, ...] = INCEPTION_FILES
) -> Inception | TorchScriptInception:
    """The extractor of one of ``PREPROCESSINGS``, from the first of ``files`` that this machine has."""
    preprocessing = PREPROCESSINGS[name]
    found = load_weights(files, weights)
    digest = extractor_digest(preprocessing.text, found.digest.encode())
    if isinstance(found.content, bytes):
        script = torch.jit.load(io.BytesIO(found.content), map_location=device).eval()
        return TorchScriptInception(device, script, preprocessing, name, digest, found.file.name)
    network = inception_network(found.content).to(device)
    return Inception(device, network, preprocessing, name, digest, found.file.name)
