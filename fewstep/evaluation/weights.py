"""Where pretrained weights come from: files already on this machine, verified before anything reads them.

Nothing here touches a network. A file is taken from the first place that has it, and its SHA-256 must be the known one:
a TorchScript file runs code when it is loaded, and some of the places are writable by everybody.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.errors import EnvironmentFault


@dataclass(frozen=True)
class WeightsFile:
    """A known file: its usual name, its SHA-256 in hex, and in words what it is and who publishes it."""

    name: str
    sha256: str
    source: str


INCEPTION = WeightsFile(
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    source="the StyleGAN2-ADA metrics network that clean-fid uses (TorchScript, 96 MB)",
)


def find_weights(file: WeightsFile, explicit: Path | None = None) -> Path:
    """The path of ``file``, searched for but not yet verified.

    An ``explicit`` path is the only place then searched. Otherwise: ``$FEWSTEP_WEIGHTS``, the checkpoints folder of
    torch's hub (``$TORCH_HOME/hub/checkpoints``), and ``/tmp``, where clean-fid keeps its copy. The first two may name
    the file itself or a folder that holds it. Nothing there is an ``EnvironmentFault``.
    """
    variable = os.environ.get("FEWSTEP_WEIGHTS")
    if explicit is not None:
        places = [explicit]
    else:
        places = [Path(variable)] if variable else []
        places += [Path(torch.hub.get_dir()) / "checkpoints", Path("/tmp")]
    candidates = [place / file.name if place.is_dir() else place for place in places]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    searched = ", ".join(str(place) for place in places)
    raise EnvironmentFault(
        f"no {file.name} (SHA-256 {file.sha256}) in: {searched}. It is {file.source}; "
        "put a copy in one of these places or name it with --weights or $FEWSTEP_WEIGHTS"
    )


def read_verified(file: WeightsFile, path: Path) -> bytes:
    """The bytes of ``path`` if they are those of ``file``; anything else is an ``EnvironmentFault``.

    Load from these bytes, not from the path again: the file may have been exchanged in between.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise EnvironmentFault(
            f"{path} is not {file.name}: its SHA-256 is {found}, expected {file.sha256}. "
            f"Replace it by {file.source}, or remove it"
        )
    return content
