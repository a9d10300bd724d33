"""From the config of a checkpoint of another project to what it holds."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.data.dataset import Dataset
from fewstep.errors import UsageError
from fewstep.networks.foreign.config import ForeignBlock
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.teachers.config import CheckpointTeacher, DiffusersTeacher
from fewstep.teachers.containers import choose
from fewstep.teachers.convert import find_converted, is_converted, read_converted
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.identify import Checkpoint, Source, identified
from fewstep.teachers.pickles import Opened, open_checkpoint


def file_digest(path: Path) -> str:
    """The sha256 of a file. One that cannot be read is a ``UsageError``."""
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def read_checkpoint(config: CheckpointTeacher) -> Checkpoint:
    """The checkpoint of a teacher config. What is missing, damaged or of another kind is a ``UsageError``.

    A file that has been converted is read from there, so that a pickle has to be trusted but once.
    """
    path = Path(config.path)
    if is_converted(path):
        return as_declared(read_converted(path, config.kind), config)
    if not path.is_file():
        what = "is a folder, not a checkpoint" if path.is_dir() else "is missing"
        raise UsageError(f"teacher.path: {path} {what}")
    folder = find_converted(file_digest(path), config.kind)
    if folder is not None and config.weights != "raw" and not config.architecture:
        return as_declared(read_converted(folder, config.kind), config)
    opened = open_checkpoint(path, trust=config.trust_pickle)
    chosen = choose(opened.tree, config.weights, str(path))
    checkpoint = identified(FORMATS[config.kind], chosen, {**made_with(opened), **config.architecture}, str(path))
    source = Source(path, opened.digest, opened.kind_of_file, chosen.source, chosen.averaged, chosen.beside)
    return as_declared(replace(checkpoint, source=source), config)


def made_with(opened: Opened) -> Mapping[str, Any]:
    """What a file says of how its network was made: that of a module; settings of a run are named as they like."""
    return opened.said if "class_name" in opened.said else {}


def as_declared(checkpoint: Checkpoint, config: CheckpointTeacher) -> Checkpoint:
    """The same under the convention that a config declares, if it does."""
    if config.convention is None:
        return checkpoint
    network = checkpoint.found.network.model_copy(update={"convention": config.convention})
    return replace(checkpoint, found=replace(checkpoint.found, network=network))


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, in the one convention; ``digest`` is that of its files, ``guided_channels`` how many
    leading channels guidance moves (None: all)."""

    name: str
    net: ForeignNetwork
    network: ForeignBlock
    digest: str
    guided_channels: int | None


def load_checkpoint(config: CheckpointTeacher, data: Dataset) -> Loaded:
    """The network of a checkpoint for these data. What does not fit them is a ``UsageError``."""
    checkpoint = read_checkpoint(config)
    found = checkpoint.found
    check_fits(config.path, (found.channels, found.side), found.num_classes, data)
    guided = checkpoint.format.guided_channels if config.guided_channels == "project" else config.guided_channels
    return Loaded(
        name=Path(config.path).stem,
        net=checkpoint.network(data.shape),
        network=found.network,
        digest=checkpoint.source.digest,
        guided_channels=None if guided == "all" or guided == data.shape[0] else guided,
    )


def check_fits(path: str, sample: tuple[int, int | None], num_classes: int, data: Dataset) -> None:
    """A ``UsageError`` unless data have the shape and the classes of a teacher; ``sample`` is channels and side."""
    channels, side = sample
    takes = f"{channels} x {side} x {side}" if side else f"{channels} channels"
    if len(data.shape) != 3 or data.shape[0] != channels or (side and data.shape[1:] != (side, side)):
        latents = ": it takes latents (data.kind=latents)" if channels >= 4 and data.kind != "latents" else ""
        raise UsageError(f"the teacher {path} takes {takes}, the data {data.name} are {_by(data.shape)}{latents}")
    if data.embeddings is not None:
        raise UsageError(f"the teacher {path} takes classes, not data.embeddings")
    if data.num_classes != num_classes:
        remedy = "set data.labels=false" if not num_classes else f"set data.num_classes={num_classes} if these are its"
        raise UsageError(
            f"the teacher {path} has {num_classes} classes, the data {data.name} have {data.num_classes}: {remedy}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def load_diffusers(config: DiffusersTeacher, data: Dataset) -> Loaded:
    raise NotImplementedError
