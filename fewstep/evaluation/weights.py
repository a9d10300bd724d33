"""Where pretrained weights come from: files already on this machine, verified before anything reads them.

Nothing here touches a network. A file is taken from the first place that has it, and its SHA-256 must be a known one:
a TorchScript file or a pickle can run code when it is loaded, and some of the places are writable by everybody. What
was a pickle is kept as safetensors in the cache (``$FEWSTEP_CACHE``, else ``~/.cache/fewstep``) and read from there
the next time.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.checkpoint import write_tensors
from fewstep.errors import EnvironmentFault
from fewstep.evaluation.extractor import tensors_digest
from fewstep.files import cache_folder


@dataclass(frozen=True)
class WeightsFile:
    """A known file: its usual name, its SHA-256 in hex, in words what it is and who publishes it, its other names."""

    name: str
    sha256: str
    source: str
    aliases: tuple[str, ...] = ()


INCEPTION = WeightsFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    source="the Inception network of pytorch-fid, release fid_weights (96 MB)",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),  # what torch-fidelity calls the same bytes
)
INCEPTION_TORCHSCRIPT = WeightsFile(
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    source="the StyleGAN2-ADA metrics network that clean-fid uses (TorchScript, 96 MB)",
)
INCEPTION_FILES = (INCEPTION, INCEPTION_TORCHSCRIPT)
"""Either gives Inception's features; the first also its class logits and its spatial map."""


def places(explicit: Path | None = None) -> list[Path]:
    """Where weights are looked for, in this order.

    An ``explicit`` path is the only place. Otherwise: ``$FEWSTEP_WEIGHTS``, the checkpoints folder of torch's hub
    (``$TORCH_HOME/hub/checkpoints``), and ``/tmp``, where clean-fid keeps its copy. The first two may be a file itself
    or a folder.
    """
    if explicit is not None:
        return [explicit]
    variable = os.environ.get("FEWSTEP_WEIGHTS")
    return [*([Path(variable)] if variable else []), Path(torch.hub.get_dir()) / "checkpoints", Path("/tmp")]


def find_weights(files: Sequence[WeightsFile], explicit: Path | None = None) -> Path:
    """The path of the first of ``files`` that some place has, not yet verified. None is an ``EnvironmentFault``."""
    searched = places(explicit)
    for file in files:
        for place in searched:
            for name in (file.name, *file.aliases):
                candidate = place / name if place.is_dir() else place
                if candidate.is_file():
                    return candidate
    wanted = "; or ".join(f"{file.name} (SHA-256 {file.sha256}), {file.source}" for file in files)
    raise EnvironmentFault(
        f"no {wanted}; searched: {', '.join(map(str, searched))}. "
        "Put a copy in one of these places or name it with --weights or $FEWSTEP_WEIGHTS"
    )


def read_verified(files: Sequence[WeightsFile], path: Path) -> tuple[WeightsFile, bytes]:
    """Which of ``files`` lies at ``path``, and its bytes; anything else is an ``EnvironmentFault``.

    Load from these bytes, not from the path again: the file may have been exchanged in between.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    for file in files:
        if file.sha256 == found:
            return file, content
    named = [file for file in files if path.name in (file.name, *file.aliases)] or list(files)
    wanted = " or ".join(f"{file.sha256} ({file.name}, {file.source})" for file in named)
    raise EnvironmentFault(
        f"{path} is not {' or '.join(file.name for file in named)}: its SHA-256 is {found}, expected {wanted}. "
        "Replace the file, or remove it"
    )


@dataclass(frozen=True)
class Weights:
    """What a file holds: a state dict, or TorchScript as its verified bytes. ``digest`` is SHA-256 over the tensors, or
    over the bytes."""

    file: WeightsFile
    content: dict[str, Tensor] | bytes
    digest: str


def load_weights(files: Sequence[WeightsFile], explicit: Path | None = None) -> Weights:
    """The first of ``files`` that this machine has.

    A conversion in the cache serves like the file that it came from, except where a file is named, with ``explicit``
    or by ``$FEWSTEP_WEIGHTS``.
    """
    named = explicit is not None or places()[0].is_file()
    if not named:
        for file in files:
            kept = _cached(file)
            if kept is not None:
                return kept
    file, content = read_verified(files, find_weights(files, explicit))
    if not file.name.endswith(".pth"):
        return Weights(file, content, file.sha256)
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    found = Weights(file, tensors, tensors_digest(tensors))
    if not named:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time the next time, nothing else
            write_tensors(cached_path(file), tensors, {"source": file.sha256, "tensors": found.digest})
    return found


def cached_path(file: WeightsFile) -> Path:
    """Where the conversion of a file is kept, be it there or not."""
    return cache_folder() / "weights" / f"{Path(file.name).stem}.safetensors"


def _cached(file: WeightsFile) -> Weights | None:
    """The tensors of a file's conversion; None where there is none or not that one any more."""
    try:
        with safe_open(cached_path(file), framework="pt") as kept:
            facts = kept.metadata() or {}
            if facts.get("source") != file.sha256:
                return None
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    digest = tensors_digest(tensors)
    return Weights(file, tensors, digest) if digest == facts.get("tensors") else None


@dataclass(frozen=True)
class WeightsFolder:
    """A known network of the transformers library: what its folder is called, and which repository it is a copy of."""

    name: str
    source: str


def find_folder(folder: WeightsFolder, explicit: Path | None = None) -> Path:
    """The local copy of ``folder``, with its ``config.json`` and safetensors. None is an ``EnvironmentFault``.

    An ``explicit`` path is the folder itself or holds it under its name, and is then the only place; otherwise
    ``$FEWSTEP_WEIGHTS`` is such a path.
    """
    variable = os.environ.get("FEWSTEP_WEIGHTS")
    roots = [explicit] if explicit is not None else [Path(variable)] if variable else []
    for root in roots:
        for candidate in (root / folder.name, root):
            if (candidate / "config.json").is_file():
                if not any(candidate.glob("*.safetensors")):
                    raise EnvironmentFault(f"{candidate} has no *.safetensors: {folder.name} needs {folder.source}")
                return candidate
    searched = ", ".join(str(root / folder.name) for root in roots) or "$FEWSTEP_WEIGHTS, which is not set"
    raise EnvironmentFault(
        f"no {folder.name}: it is a folder with config.json and model.safetensors, a copy of {folder.source}; "
        f"searched: {searched}. Name it with --weights, or put it at $FEWSTEP_WEIGHTS/{folder.name}"
    )
