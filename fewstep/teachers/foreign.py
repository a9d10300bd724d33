"""From the config of a checkpoint of another project to what it holds."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.console import say
from fewstep.data.dataset import Dataset, LatentScale
from fewstep.errors import UsageError
from fewstep.files import digest
from fewstep.networks.condition import Inputs
from fewstep.networks.foreign.build import raw_network
from fewstep.networks.foreign.config import DiffusersConfig, ForeignConfig
from fewstep.networks.foreign.converted import ForeignNetwork
from fewstep.networks.foreign.diffusers_families import FAMILIES
from fewstep.teachers.config import CheckpointTeacher, DiffusersTeacher
from fewstep.teachers.containers import choose
from fewstep.teachers.convert import find_converted, is_converted, read_converted
from fewstep.teachers.formats.diffusers import DiffusersFound, read_folder
from fewstep.teachers.formats.table import FORMATS
from fewstep.teachers.identify import Checkpoint, Source, check_names, check_numbers, identified, in_float32
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


OF_ONE_SIZE = ("DiTTransformer2DModel", "UNet2DModel")
"""Networks of diffusers that are asked for images as large as those they were trained on; the others place patches
wherever they are."""


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, in the one convention; ``digest`` is that of its files, ``guided_channels`` how many
    leading channels guidance moves (None: all)."""

    name: str
    net: ForeignNetwork
    network: ForeignConfig
    digest: str
    guided_channels: int | None
    num_classes: int


def load_checkpoint(config: CheckpointTeacher, data: Dataset, *, weak: bool = False) -> Loaded:
    """The network of a checkpoint for these data. What does not fit them is a ``UsageError``; only the ``weak`` one of
    two may know no classes."""
    checkpoint = read_checkpoint(config)
    found = checkpoint.found
    sides = None if found.side is None else (found.side, found.side)
    ignores = weak and not found.num_classes
    check_fits(config.path, found.channels, sides, data.num_classes if ignores else found.num_classes, data)
    guided = checkpoint.format.guided_channels if config.guided_channels == "project" else config.guided_channels
    return Loaded(
        name=Path(config.path).stem,
        net=checkpoint.network(data.shape),
        network=found.network,
        digest=checkpoint.source.digest,
        guided_channels=None if guided == "all" or guided is None or guided >= data.shape[0] else guided,
        num_classes=found.num_classes,
    )


def check_fits(
    path: str,
    channels: int,
    sides: tuple[int, int] | None,
    num_classes: int,
    data: Dataset,
    *,
    told: tuple[str, ...] = (),
) -> None:
    """A ``UsageError`` unless data have the shape and the conditions of a teacher: of ``sides`` (height and width)
    unless that is None, and either ``num_classes`` classes or the embeddings that it is ``told``."""
    takes = _by((channels, *sides)) if sides else f"{channels} channels"
    if len(data.shape) != 3 or data.shape[0] != channels or (sides and data.shape[1:] != sides):
        latents = ": it takes latents (data.kind=latents)" if channels >= 4 and data.kind != "latents" else ""
        raise UsageError(f"the teacher {path} takes {takes}, the data {data.name} are {_by(data.shape)}{latents}")
    if told and data.embeddings is None:
        raise UsageError(f"the teacher {path} is told {' and '.join(told)}: give them in data.embeddings")
    if told:
        assert data.embeddings is not None
        absent = [name for name in told if name not in data.embeddings.values]
        if absent:
            has = ", ".join(data.embeddings.values)
            raise UsageError(f"the teacher {path} is told {' and '.join(told)}; data.embeddings has {has}")
        return
    if data.embeddings is not None:
        raise UsageError(f"the teacher {path} takes {'classes' if num_classes else 'no condition'}: no data.embeddings")
    if data.num_classes != num_classes:
        remedy = "set data.labels=false" if not num_classes else f"set data.num_classes={num_classes} if these are its"
        raise UsageError(
            f"the teacher {path} has {num_classes} classes, the data {data.name} have {data.num_classes}: {remedy}"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def load_diffusers(config: DiffusersTeacher, data: Dataset) -> Loaded:
    """The network of a diffusers folder for these data. What does not fit them is a ``UsageError``."""
    found = read_diffusers(config)
    sides = found.sides if found.network.family in OF_ONE_SIZE else None
    check_fits(config.path, found.channels, sides, found.num_classes, data, told=told(found.network))
    inputs = Inputs(found.num_classes, two_times=False)
    raw = raw_network(found.network, data.shape, found.num_classes)
    weights = found.weights()
    check_numbers(weights, config.path)
    check_names(weights, raw.state_dict(), found.network.family, config.path)
    raw.load_state_dict(in_float32(weights))
    _compare_scale(config.path, found.latent, data)
    digests = [file_digest(file) for file in found.files]
    return Loaded(
        name=Path(config.path).name,
        net=ForeignNetwork(raw, found.network.convention, inputs),
        network=found.network,
        digest=digest(" ".join(digests).encode()),
        guided_channels=None,
        num_classes=found.num_classes,
    )


def read_diffusers(config: DiffusersTeacher) -> DiffusersFound:
    """What the folder of a config holds, under what the config declares."""
    said = config.model_dump(include={"convention", "embedded_guidance", "null_class"}, exclude_none=True)
    return read_folder(Path(config.path), said)


def told(network: DiffusersConfig) -> tuple[str, ...]:
    """The names of the tensors that a network is told; none for one of classes."""
    return tuple(FAMILIES[network.family].told)


def _compare_scale(path: str, latent: LatentScale | None, data: Dataset) -> None:
    """Say so if latents are scaled otherwise than the teacher's autoencoder says."""
    if latent is None or data.latent is None:
        return
    theirs, ours = latent.to_json(), data.latent.to_json()
    for name in ("scale", "shift"):
        if not torch.allclose(torch.tensor(theirs[name]), torch.tensor(ours[name]), rtol=1e-3, atol=1e-6):
            say(
                f"warning: the latents have {name} {ours[name][0]:g}, and the autoencoder of {path} says "
                f"{theirs[name][0]:g}: set data.{name} if they are its"
            )
