"""Principal components of the reference's pixels: the few directions in which the data vary most.

Shapes: N images, C channels, H by W pixels, P values of a reduced image, K components.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.evaluation.extractor import check_images, extractor_digest, tensors_digest

COMPONENTS = 64
SIDE = 32
_TEXT = f"pca: block means of sides above {SIDE}, u / 127.5 - 1, {COMPONENTS} components of the reference"


@dataclass(frozen=True)
class Pca:
    """What components are found in: pixels ``[N, P]``, with sides above 32 reduced to 32 by the means of blocks.

    ``fit`` makes the extractor of a reference. Block means are sums of whole numbers in float64, the same everywhere.
    """

    device: torch.device
    components: int = COMPONENTS
    name: str = "pca_unfitted"  # no number of the pixels themselves passes for one of the components
    dim: int | None = None
    digest: str = extractor_digest(f"unfitted {_TEXT}")
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        x = images.to(self.device)
        if max(x.shape[2:]) > SIDE:
            reduced = F.adaptive_avg_pool2d(x.double(), (min(x.shape[2], SIDE), min(x.shape[3], SIDE)))
            return (reduced / 127.5 - 1).float().flatten(1)
        return x.flatten(1).float() / 127.5 - 1

    def fit(self, features: Tensor) -> "FittedPca":
        """The extractor of the reference with these pixels ``[N, P]``. Its digest covers them, not the components,
        whose last bits depend on the machine."""
        if len(features) < 2 or not bool(torch.isfinite(features).all()):
            raise ValueError(f"principal components need two finite samples or more, got {list(features.shape)}")
        mean = features.mean(0, dtype=torch.float64)
        if len(features) < features.shape[1]:
            _, values, vectors = torch.linalg.svd(features - mean, full_matrices=False)
            basis = vectors[values > values[0] * 1e-9].T
        else:
            scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
            for block in features.split(4096):
                centred = block - mean
                scatter.addmm_(centred.T, centred)
            values, vectors = torch.linalg.eigh(scatter)
            basis = vectors[:, values > values[-1] * 1e-12].flip(1)
        basis = basis[:, : min(self.components, len(features) - 1)]
        if basis.shape[1] == 0:
            raise ValueError("principal components of samples that are all the same")
        largest = basis.abs().argmax(0)  # of either sign of a component, the one whose largest entry is positive
        basis = basis * basis[largest, torch.arange(basis.shape[1], device=basis.device)].sign()
        reference = tensors_digest({"reference": features})
        digest = extractor_digest(f"{_TEXT}, {self.components}", reference.encode())
        return FittedPca(self, mean.float(), basis.float(), digest)


@dataclass(frozen=True)
class FittedPca:
    """Coordinates ``[N, K]`` along the principal components of one reference, centred there. K is 64, or fewer where
    the reference spans fewer directions."""

    pixels: Pca
    mean: Tensor
    basis: Tensor
    digest: str
    name: str = "pca"
    takes: Literal["uint8", "float"] = "uint8"

    @property
    def dim(self) -> int | None:
        return self.basis.shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        return self.project(self.pixels(images))

    def project(self, features: Tensor) -> Tensor:
        """Pixels ``[N, P]``, as ``pixels`` gives them, -> coordinates ``[N, K]``. Another P is a ``ValueError``."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"components of {len(self.mean)} pixel values, got {list(features.shape)}")
        return (features - self.mean) @ self.basis
