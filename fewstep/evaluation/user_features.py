"""Features by a user's own function, found by its address. Nothing is known of them, and their name says so."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import UsageError
from fewstep.evaluation.extractor import check_images, extractor_digest, tensors_digest


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
    """What lies at ``package.module:name``; the working directory is looked in too. A class is called without
    arguments, a module is frozen. What is not there or cannot be called is a ``UsageError``."""
    module, _, path = target.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        made = found() if inspect.isclass(found) else found
    except Exception as error:  # somebody else's code fails as it likes
        raise UsageError(f"callable:{target}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(made):
        raise UsageError(f"callable:{target} is a {type(made).__name__}: it has to be a function of images")
    weights = ""
    if isinstance(made, nn.Module):
        made = made.eval().requires_grad_(False).to(device)
        weights = tensors_digest(made.state_dict())
    source = ""
    with contextlib.suppress(OSError, TypeError):  # built in, or typed in
        source = inspect.getsource(inspect.getmodule(made) or type(made))
    digest = "unverified-" + extractor_digest(f"callable:{target}", (source + weights).encode())
    return UserFeatures(device, made, user_features_name(target), digest)


def user_features_name(target: str) -> str:
    """What the features of ``package.module:name`` are called: the function's name, marked as nobody else's word."""
    return "unverified_" + target.partition(":")[2].replace(".", "_")
