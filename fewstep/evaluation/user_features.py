"""Features by a user's own function, found by its address. Nothing is known of them, and their name says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import UsageError
from fewstep.evaluation.extractor import check_images, extractor_digest, tensors_digest
from fewstep.targets import load_target, source_of


@dataclass(frozen=True)
class UserFeatures:
    """A function from uint8 images ``[N, C, H, W]`` on ``device`` to features ``[N, D]``. What it does to its images
    and whether each row depends on its image alone is the user's word: ``digest`` begins with ``unverified-``."""

    device: torch.device
    function: Callable[[Tensor], Any]
    name: str
    digest: str
    dim: int | None = None
    takes: Literal["uint8", "float"] = "uint8"

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        try:
            found = self.function(images.to(self.device))
        except Exception as error:  # somebody else's code fails as it likes
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{self.name} fails on images {list(images.shape)}: {type(error).__name__}: {said}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            gives = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UsageError(f"{self.name} gives {gives} for {len(images)} images: it has to be a tensor [N, D]")
        return found.detach().to(self.device).float()


def load_user_features(target: str, device: torch.device) -> UserFeatures:
    """What lies at ``package.module:name`` (``load_target``); a module is frozen."""
    made = load_target(target, "callable:", "of images")
    weights = ""
    if isinstance(made, nn.Module):
        made = made.eval().requires_grad_(False).to(device)
        weights = tensors_digest(made.state_dict())
    digest = "unverified-" + extractor_digest(f"callable:{target}", source_of(made) + weights.encode())
    return UserFeatures(device, made, user_features_name(target), digest)


def user_features_name(target: str) -> str:
    """What the features of ``package.module:name`` are called: the function's name, marked as nobody else's word."""
    return "unverified_" + target.partition(":")[2].replace(".", "_")
