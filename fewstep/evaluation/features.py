"""Feature extractors: what images are measured by. One pass serves every metric.

An extractor owns its resizing and scaling; its ``digest`` covers its weights and its preprocessing, so that equal
digests mean comparable numbers. Features are float32 in eval mode, without autocast and without TF32.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.errors import UsageError, nearest
from fewstep.evaluation.classifier import load_classifier
from fewstep.evaluation.digits_classifier import FEATURE_DIM, DigitsClassifier, load_digits_classifier
from fewstep.evaluation.encoders import ENCODERS, load_encoder
from fewstep.evaluation.extractor import (
    Classifier,
    Described,
    Everything,
    FeatureExtractor,
    Fitted,
    Spatial,
    check_images,
    extractor_digest,
)
from fewstep.evaluation.inception_features import PREPROCESSINGS, load_inception
from fewstep.evaluation.pca import Pca
from fewstep.evaluation.random_conv import RandomConv
from fewstep.evaluation.user_features import load_user_features, user_features_name
from fewstep.precision import products

__all__ = [
    "EXTRACTORS",
    "Classifier",
    "Described",
    "Everything",
    "FeatureExtractor",
    "Fitted",
    "Spatial",
    "build_extractor",
    "check_features",
    "class_accuracy",
    "extract",
    "extract_everything",
    "extractor_facts",
    "extractor_name",
    "fitted",
    "load_digits",
    "metric_name",
]

EXTRACTORS = ("pixels", "identity", "digits", *PREPROCESSINGS, *ENCODERS, "random_conv", "pca")
"""Extractors that go by a name alone; ``classifier:FOLDER`` and ``callable:pkg.mod:fn`` go by an address."""


@dataclass(frozen=True)
class Pixels:
    """Flattened grey levels ``u / 127.5 - 1``: needs nothing, blind to everything but pixelwise likeness."""

    device: torch.device
    name: str = "pixels"
    dim: int | None = None
    digest: str = field(default_factory=lambda: extractor_digest("pixels: u / 127.5 - 1, flattened NCHW"))
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        return images.to(self.device).flatten(1).float() / 127.5 - 1


@dataclass(frozen=True)
class Identity:
    """The samples themselves, unquantised and flattened: 2-D toys and latents."""

    device: torch.device
    name: str = "identity"
    dim: int | None = None
    digest: str = field(default_factory=lambda: extractor_digest("identity: samples as float32, flattened"))
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
        check_images(images)
        if images.shape[1:] != (1, 8, 8):
            raise UsageError(
                f"digits features take 1x8x8 images, got {'x'.join(map(str, images.shape[1:]))}: use pixels"
            )
        return self.network.features(images.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        return self.network.head(features)


def build_extractor(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> FeatureExtractor:
    """The extractor called ``name``; ``weights`` is where its weights lie, if not in a usual place.

    An unknown name is a ``UsageError``; missing or foreign weights are an ``EnvironmentFault``. Both before any work.
    """
    device = torch.device(device)
    if name in PREPROCESSINGS:
        return load_inception(name, device, weights)
    if name in ENCODERS:
        return load_encoder(name, device, weights)
    kind, _, address = name.partition(":")
    match kind, address:
        case "pixels", "":
            return Pixels(device)
        case "identity", "":
            return Identity(device)
        case "digits", "":
            return load_digits(device)
        case "random_conv", "":
            return RandomConv(device)
        case "pca", "":
            return Pca(device)
        case "classifier", str():
            if not address:
                raise UsageError("classifier features are named with their folder, as classifier:FOLDER")
            return load_classifier(Path(address).expanduser(), device)
        case "callable", str():
            if ":" not in address:
                raise UsageError(f"callable features are named as callable:package.module:function, got '{name}'")
            return load_user_features(address, device)
    raise UsageError(f"unknown features '{name}': {nearest(name, EXTRACTORS)}")


def load_digits(device: torch.device) -> Digits:
    network = load_digits_classifier()
    # Of the tensors, not of the file: a file's header may order its metadata differently each time it is written.
    content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(network.state_dict().items()))
    return Digits(device, network.to(device), extractor_digest("digits: u / 127.5 - 1", content))


@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features ``[N, D]`` of ``images [N, ...]``, computed in batches, on the extractor's device."""
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"nothing to extract: {len(images)} images, batch size {batch_size}")
    with products("fp32"):
        return torch.cat([extractor(batch) for batch in images.split(batch_size)])


@torch.no_grad()
def extract_everything(extractor: FeatureExtractor, images: Tensor, batch_size: int = 256) -> Everything:
    """What ``extract`` gives, and the logits and the spatial map of an extractor that has them, from one pass."""
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"nothing to extract: {len(images)} images, batch size {batch_size}")
    with products("fp32"):
        parts = [_everything(extractor, batch) for batch in images.split(batch_size)]
    return Everything(
        torch.cat([part.features for part in parts]),
        _joined([part.logits for part in parts]),
        _joined([part.spatial for part in parts]),
    )


def _everything(extractor: FeatureExtractor, images: Tensor) -> Everything:
    if isinstance(extractor, Spatial):
        return extractor.everything(images)
    features = extractor(images)
    return Everything(features, extractor.logits(features) if isinstance(extractor, Classifier) else None, None)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None


def extractor_facts(extractor: FeatureExtractor) -> dict[str, Any]:
    """What results say of an extractor: ``dim``, ``digest``, and in words, where it has them, ``preprocessing``,
    ``weights`` and what else is known."""
    facts = dict(extractor.facts) if isinstance(extractor, Described) else {}
    return {**facts, "dim": extractor.dim, "digest": extractor.digest}


def fitted(extractor: FeatureExtractor, reference_features: Tensor) -> FeatureExtractor:
    """The extractor for the reference whose features ``[N, D]`` these are, as ``extractor`` itself gave them: another
    one where it is ``Fitted``, else the same."""
    return extractor.fit(reference_features) if isinstance(extractor, Fitted) else extractor


def extractor_name(features: str) -> str:
    """What the extractor that is asked for as ``features`` is called: the kind without an address."""
    kind, _, address = features.partition(":")
    return user_features_name(address) if kind == "callable" else kind


def metric_name(kind: str, extractor: str) -> str:
    """A metric's column name: bare for Inception (where ``fd`` is ``fid``, ``kd`` is ``kid``), else ``kind_extractor``.

    No score on other features may appear as FID or KID, so ``kind`` is never one of these, nor ``fid_debiased``.
    """
    if kind.split("_")[0] in ("fid", "kid"):
        raise ValueError(f"{kind} is a name, reserved for Inception features; the kinds are fd and kd")
    if extractor == "inception":
        return {"fd": "fid", "kd": "kid", "fd_debiased": "fid_debiased"}.get(kind, kind)
    return f"{kind}_{extractor}"


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit ``[N, classes]`` is that of their label ``[N]``."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"one label per sample: logits {list(logits.shape)}, labels {list(labels.shape)}")
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def check_features(*matrices: Tensor) -> None:
    """``ValueError`` unless all are finite ``[N, D]`` with one ``D`` and at least two rows."""
    for features in matrices:
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != matrices[0].shape[1]:
            shapes = ", ".join(str(list(each.shape)) for each in matrices)
            raise ValueError(f"features are [N, D] with N >= 2 and one D, got {shapes}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError("features hold NaN or infinite values")
