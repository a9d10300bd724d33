"""What a feature extractor is, and what its kinds share: checks of images, digests, true float32.

Shapes: N images, C channels, H by W pixels, D features, K classes.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fewstep.errors import UsageError


@runtime_checkable
class FeatureExtractor(Protocol):
    """Images ``[N, C, H, W]`` -> features ``[N, D]`` float32, on the extractor's device.

    ``dim`` is ``D``, None where it follows the sample's shape. ``digest`` covers the weights and the preprocessing, so
    that equal digests mean comparable numbers. ``takes`` says whether images come quantised (all but ``identity``,
    which takes the samples themselves). Row ``i`` depends on image ``i`` alone, up to rounding.
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
    """An extractor whose features a linear head sorts into classes. Where these are the classes of the data,
    conditional samples can be checked; Inception's 1008 are its own."""

    def logits(self, features: Tensor) -> Tensor:
        """Features ``[N, D]`` -> class logits ``[N, K]``."""
        ...


class Everything(NamedTuple):
    """All that one pass gives: features ``[N, D]``, class logits ``[N, K]`` and a spatial map ``[N, S]``, each float32;
    None for what an extractor does not have."""

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None


@runtime_checkable
class Spatial(FeatureExtractor, Protocol):
    """An extractor that keeps where things are in an early map (``spatial``), which sFID is measured on."""

    def spatial(self, images: Tensor) -> Tensor:
        """The flattened map ``[N, S]`` float32 of images ``[N, C, H, W]``."""
        ...

    def everything(self, images: Tensor) -> Everything:
        """Features, logits and map from one pass."""
        ...


@runtime_checkable
class Described(FeatureExtractor, Protocol):
    """An extractor that says in words what its digest covers: its preprocessing, and where its weights came from."""

    @property
    def facts(self) -> Mapping[str, Any]: ...


@runtime_checkable
class Fitted(FeatureExtractor, Protocol):
    """An extractor that is made for a reference: until then its features are what it is fitted to."""

    def fit(self, features: Tensor) -> FeatureExtractor:
        """The extractor for the reference whose features ``[N, D]`` these are. Too few of them: ``ValueError``."""
        ...


def check_images(images: Tensor) -> None:
    """``ValueError`` unless images are uint8 ``[N, C, H, W]``."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are uint8 [N, C, H, W] (see to_uint8), got {images.dtype} {list(images.shape)}")


def as_colour(images: Tensor, name: str) -> Tensor:
    """uint8 images ``[N, 1 or 3, H, W]`` with three channels: grey ones three times the same. Else ``UsageError``."""
    check_images(images)
    if images.shape[1] not in (1, 3):
        raise UsageError(f"{name} features take grey or colour images, got {images.shape[1]} channels")
    return images.expand(-1, 3, -1, -1)


def extractor_digest(preprocessing: str, weights: bytes = b"") -> str:
    """SHA-256 in hex over the preprocessing in words and the weights, or a digest of these."""
    return hashlib.sha256(preprocessing.encode() + b"\0" + weights).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over names, dtypes, shapes and values, whatever file the tensors came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
