"""Feature extractors: what images are measured by. One pass serves every metric.

An extractor owns its resizing and scaling; its ``digest`` covers its weights and its preprocessing, so that equal
digests mean comparable numbers. Features are float32 in eval mode, without autocast and without TF32.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.compat import prepare_torchvision
from fewstep.errors import UsageError, nearest
from fewstep.evaluation.digits_classifier import FEATURE_DIM, DigitsClassifier, load_digits_classifier
from fewstep.evaluation.weights import INCEPTION, WeightsFile, find_weights, read_verified

EXTRACTORS = ("pixels", "identity", "digits", "inception")
INCEPTION_SIZE = 299


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images ``[N, C, H, W]`` -> features ``[N, D]`` float32, on the extractor's device.

    ``dim`` is ``D``, None where it follows the sample's shape. ``takes`` says whether images come quantised (all but
    ``identity``, which takes the samples themselves). Row ``i`` depends on image ``i`` alone, up to rounding.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int | None: ...

    @property
    def digest(self) -> str: ...

    @property
    def takes(self) -> Literal["uint8", "float"]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Classifier(FeatureExtractor, Protocol):
    """An extractor whose features a linear head classifies, so that conditional samples can be checked."""

    def logits(self, features: Tensor) -> Tensor:
        """Features ``[N, D]`` -> class logits ``[N, classes]``."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Flattened grey levels ``u / 127.5 - 1``: needs nothing, blind to everything but pixelwise likeness."""

    device: torch.device
    name: str = "pixels"
    dim: int | None = None
    digest: str = field(default_factory=lambda: _digest("pixels: u / 127.5 - 1, flattened NCHW"))
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        _check_images(images)
        return images.to(self.device).flatten(1).float() / 127.5 - 1


@dataclass(frozen=True)
class Identity:
    """The samples themselves, unquantised and flattened: 2-D toys and latents."""

    device: torch.device
    name: str = "identity"
    dim: int | None = None
    digest: str = field(default_factory=lambda: _digest("identity: samples as float32, flattened"))
    takes: Literal["uint8", "float"] = "float"

    def __call__(self, images: Tensor) -> Tensor:
        if not images.is_floating_point() or images.ndim < 2:
            raise ValueError(f"identity takes floating-point samples [N, ...], got {images.dtype} {list(images.shape)}")
        return images.to(self.device).flatten(1).float()


@dataclass(frozen=True)
class Digits:
    """The penultimate layer of the shipped digits classifier, and its class logits."""

    device: torch.device
    network: DigitsClassifier
    digest: str
    name: str = "digits"
    dim: int | None = FEATURE_DIM
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        _check_images(images)
        if images.shape[1:] != (1, 8, 8):
            raise UsageError(
                f"digits features take 1x8x8 images, got {'x'.join(map(str, images.shape[1:]))}: use pixels"
            )
        return self.network.features(images.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        return self.network.head(features)


@dataclass(frozen=True)
class Inception:
    """The 2048 pooled features that FID is defined on, with the "clean" resize (Parmar et al. 2104.11222)."""

    device: torch.device
    network: nn.Module
    digest: str
    name: str = "inception"
    dim: int | None = 2048
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        _check_images(images)
        if images.shape[1] not in (1, 3):
            raise UsageError(f"inception features take grey or colour images, got {images.shape[1]} channels")
        return self.network(resize_clean(images.to(self.device).expand(-1, 3, -1, -1), INCEPTION_SIZE)).float()


def resize_clean(images: Tensor, size: int) -> Tensor:
    """uint8 ``[N, C, H, W]`` to float32 ``[N, C, size, size]`` in [0, 255], not quantised again.

    Bicubic with antialiasing is PIL's filter (a = -1/2) to within 0.002 grey levels. Without antialiasing torch uses
    another cubic (a = -3/4), which is wrong even when it enlarges.
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


def build_extractor(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """The extractor called ``name``; ``weights`` is where Inception's file lies, if not in a usual place.

    An unknown name is a ``UsageError``; missing or foreign weights are an ``EnvironmentFault``. Both before any work.
    """
    device = torch.device(device)
    match name:
        case "pixels":
            return Pixels(device)
        case "identity":
            return Identity(device)
        case "digits":
            return load_digits(device)
        case "inception":
            return load_inception(device, weights)
    raise UsageError(f"unknown features '{name}': {nearest(name, EXTRACTORS)}")


def load_digits(device: torch.device) -> Digits:
    network = load_digits_classifier()
    # Of the tensors, not of the file: a file's header may order its metadata differently each time it is written.
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(network.state_dict().items()))
    return Digits(device, network.to(device), _digest("digits: u / 127.5 - 1", content))


def load_inception(device: torch.device, weights: Path | None, file: WeightsFile = INCEPTION) -> Inception:
    """clean-fid's wrapper around the verified TorchScript network, without its own resize."""
    content = read_verified(file, find_weights(file, weights))
    prepare_torchvision()
    from cleanfid.inception_torchscript import InceptionV3W

    with tempfile.TemporaryDirectory() as folder:  # a private copy of the very bytes that were verified
        (Path(folder) / INCEPTION.name).write_bytes(content)
        network = InceptionV3W(folder, download=False, resize_inside=False)
    network = network.eval().requires_grad_(False).to(device)
    return Inception(device, network, _digest("inception clean: bicubic antialias 299, (u - 128) / 128", content))


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features ``[N, D]`` of ``images [N, ...]``, computed in batches, on the extractor's device."""
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"nothing to extract: {len(images)} images, batch size {batch_size}")
    with full_float32():
        return torch.cat([extractor(batch) for batch in images.split(batch_size)])


def metric_name(kind: str, extractor: str) -> str:
    """A metric's column name: bare for Inception (where ``fd`` is ``fid``, ``kd`` is ``kid``), else ``kind_extractor``.

    No score on other features may appear as FID or KID, so ``kind`` is never one of these.
    """
    if kind in ("fid", "kid"):
        raise ValueError(f"{kind} is a name, reserved for Inception features; the kinds are fd and kd")
    if extractor == "inception":
        return {"fd": "fid", "kd": "kid"}.get(kind, kind)
    return f"{kind}_{extractor}"


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit ``[N, classes]`` is that of their label ``[N]``."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"one label per sample: logits {list(logits.shape)}, labels {list(labels.shape)}")
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


@contextmanager
def full_float32() -> Iterator[None]:
    """Run with true float32 products (TF32 costs a relative error of 3e-4), then restore the caller's choice."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_features(*matrices: Tensor) -> None:
    """``ValueError`` unless all are finite ``[N, D]`` with one ``D`` and at least two rows."""
    for features in matrices:
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != matrices[0].shape[1]:
            shapes = ", ".join(str(list(each.shape)) for each in matrices)
            raise ValueError(f"features are [N, D] with N >= 2 and one D, got {shapes}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features hold NaN or infinite values")


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are uint8 [N, C, H, W] (see to_uint8), got {images.dtype} {list(images.shape)}")


def _digest(preprocessing: str, weights: bytes = b"") -> str:
    return hashlib.sha256(preprocessing.encode() + b"\0" + weights).hexdigest()
