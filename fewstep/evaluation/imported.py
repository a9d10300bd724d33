"""Reference statistics of other projects, read without running anything.

* ``.npz`` of clean-fid, EDM and pytorch-fid: ``mu [D]``, ``sigma [D, D]``; clean-fid's for KID: ``feats [N, D]``
* ``.npz`` of guided-diffusion (ADM): also ``mu_s``, ``sigma_s`` (spatial features) and ``arr_0``, uint8 images NHWC
* ``.pkl`` of EDM2: such pairs by metric, ``fid`` and ``fd_dinov2``; of StyleGAN3: sums ``raw_mean``, ``raw_cov``

They say neither how their images were resized nor of which they are: numbers against them are marked as imported.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UsageError
from fewstep.evaluation.extractor import FeatureExtractor
from fewstep.evaluation.frechet import Moments, moments
from fewstep.evaluation.neighbours import radii
from fewstep.evaluation.reference import K, ReferenceFeatures, tiled_features
from fewstep.files import digest
from fewstep.inert import Reader, plain

MANY = 2**31
"""Stands for the number of samples where a file does not say it."""

_METRICS = {"inception": "fid", "dinov2": "fd_dinov2"}
"""Under which key EDM2's files have the statistics of an extractor, by how its name begins."""


@dataclass(frozen=True)
class Imported:
    """What a file holds: moments of features, of spatial features, features, reference images (uint8 NCHW). ``n`` is
    None where the file does not say how many samples it is of; ``digest`` is the file's."""

    path: Path
    digest: str
    n: int | None = None
    mean: Tensor | None = None
    cov: Tensor | None = None
    spatial: Moments | None = None
    features: Tensor | None = None
    images: Tensor | None = None

    @property
    def dim(self) -> int:
        found = self.mean if self.mean is not None else self.features
        assert found is not None
        return found.shape[-1]


def read_imported(path: Path, metric: str = "fid") -> Imported:
    """Read a file by its ending; ``metric`` chooses where a file has several. What is missing, damaged, or would have
    to be run, is a ``UsageError``."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    arrays = _pickled(path, metric) if path.suffix == ".pkl" else _zipped(path)
    try:
        return _imported(path, digest(content), arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no statistics that are known here ({error})") from error


def serves(found: Imported, extractors: Mapping[str, int | None]) -> str:
    """The extractor (name -> dimension) that a file is for: one of as many dimensions, Inception's if there is one."""
    fitting = [name for name, dim in extractors.items() if dim == found.dim]
    inception = [name for name in fitting if name.startswith("inception")]
    if not fitting:
        listed = ", ".join(f"{name} has {'other' if dim is None else dim}" for name, dim in extractors.items())
        raise UsageError(f"{found.path} has features of {found.dim} dimensions: {listed}")
    return (inception or fitting)[0]


def imported_reference(found: Imported, extractor: FeatureExtractor, device: torch.device) -> ReferenceFeatures:
    """An imported file as a reference. Where it has images, neighbours and kernel distances are of those."""
    features = None if found.features is None else found.features.float().to(device)
    if features is None and found.images is not None:
        features = tiled_features(extractor, found.images.to(device))
    if found.mean is not None and found.cov is not None:
        known = Moments(found.mean.to(device), found.cov.to(device), found.n or MANY)
    else:
        assert features is not None
        known = moments(features)
    if features is not None and (features.shape[1] != len(known.mean) or len(features) <= K):
        features = None
    return ReferenceFeatures(
        extractor,
        features,
        known,
        None if features is None else radii(features, K),
        {"dataset": found.path.name, "digest": found.digest, "n": found.n, "imported": True},
        found.spatial,
    )


def _imported(path: Path, digest_: str, arrays: Mapping[str, Any]) -> Imported:
    n = int(arrays["n"]) if "n" in arrays else None
    if "raw_mean" in arrays:
        n = int(arrays["num_items"])
        mean = _numbers(arrays["raw_mean"]) / n
        cov = _numbers(arrays["raw_cov"]) / n - torch.outer(mean, mean)
        return _checked(Imported(path, digest_, n, mean, cov))
    images = _images(arrays["arr_0"]) if "arr_0" in arrays else None
    if "feats" in arrays and "mu" not in arrays:
        features = _numbers(arrays["feats"])
        if features.ndim != 2 or len(features) < 2 or not bool(features.isfinite().all()):
            raise ValueError("feats are not finite features [N, D]")
        return Imported(path, digest_, len(features), features=features)
    mean, cov = _numbers(arrays["mu"]).flatten(), _numbers(arrays["sigma"])
    spatial = None
    if "mu_s" in arrays and "sigma_s" in arrays:
        spatial = Moments(_numbers(arrays["mu_s"]).flatten(), _numbers(arrays["sigma_s"]), n or MANY)
    return _checked(Imported(path, digest_, n, mean, cov, spatial, images=images))


def _checked(found: Imported) -> Imported:
    assert found.mean is not None
    assert found.cov is not None
    if found.cov.shape != (len(found.mean), len(found.mean)):
        raise ValueError(f"a mean of {len(found.mean)} and a covariance of {list(found.cov.shape)}")
    if not bool(found.mean.isfinite().all() and found.cov.isfinite().all()):
        raise ValueError("its numbers are not finite")
    return found


def _zipped(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise UsageError(f"{path} is one array, not an npz file with mu and sigma")
            wanted = ("mu", "sigma", "mu_s", "sigma_s", "arr_0", "feats", "n")
            return {name: file[name] for name in wanted if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"{path} is no npz file that can be read without running it ({error})") from error


def _pickled(path: Path, metric: str) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            reader = Reader(file)
            found = reader.load()
            strangers = sorted(reader.strangers)
            tree = None if strangers else plain(found)
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{path} is no pickle of plain numbers ({type(error).__name__}: {error})") from error
    if strangers:
        raise UsageError(f"{path} names {', '.join(strangers[:6])}, which would run as code: it is not read")
    if isinstance(tree, Mapping) and isinstance(tree.get(metric), Mapping):
        tree = tree[metric]
    if not isinstance(tree, Mapping):
        raise UsageError(f"{path} holds no statistics by name")
    return tree


def metric_key(extractor: str) -> str:
    """Under which key EDM2's files have an extractor's statistics."""
    return next((key for name, key in _METRICS.items() if extractor.startswith(name)), extractor)


def _numbers(found: Any) -> Tensor:
    return (found if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))).double()


def _images(found: Any) -> Tensor:
    """uint8 NHWC, as other projects keep samples, to NCHW."""
    images = found if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found))
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"arr_0 is {images.dtype} {list(images.shape)}: images are uint8 [N, H, W, 1 or 3]")
    return images.permute(0, 3, 1, 2).contiguous()


def read_samples(path: Path) -> Tensor:
    """Images ``[N, C, H, W]`` uint8 of a sample batch in ``.npz`` (``arr_0``, NHWC); else a ``UsageError``."""
    arrays = _zipped(path)
    if "arr_0" not in arrays:
        raise UsageError(f"{path} has no arr_0: a batch of samples is uint8 [N, H, W, C] under that name")
    try:
        return _images(arrays["arr_0"])
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: {error}") from error
