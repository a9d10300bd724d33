"""Latents that an autoencoder made and somebody cached. What lies at a path is found by looking.

- fewstep's shards, see ``shards``;
- LightningDiT: safetensors files with ``latents``, ``latents_flip`` and ``labels``, statistics in ``latents_stats.pt``;
- EDM2 and REPA: a tree or a zip archive of ``img-mean-std-00000000.npy``, each the mean and the standard deviation
  ``[2 C, H, W]`` of one image's latent, with a ``dataset.json``; REPA's may lie in ``vae-sd``.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data.config import LatentsConfig
from fewstep.data.dataset import Dataset, LatentScale
from fewstep.data.folder import MANIFEST
from fewstep.data.labels import checked_labels, read_manifest, tree_labels
from fewstep.data.paths import existing
from fewstep.data.rows import OnDisk
from fewstep.data.shards import META, assemble, damage, load_shards, map_tensors, tensor_names
from fewstep.data.zipped import DAMAGE, open_archive, read_member
from fewstep.errors import UsageError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Shift and scale, one of each per channel."""

EDM2: Statistics = ((5.81, 3.25, 0.12, -2.15), tuple(0.5 / std for std in (4.17, 4.62, 3.71, 3.28)))
"""EDM2's statistics of sd-vae-ft-mse latents (Karras et al. 2312.02696): they bring the deviation to 0.5."""

REPA: Statistics = ((0.0,) * 4, (0.18215,) * 4)
"""What REPA does with the same latents, those of its folder ``vae-sd``: the autoencoder's own factor."""

STATISTICS = "latents_stats.pt"


def load_latents(config: LatentsConfig, path: Path, name: str) -> Dataset:
    """Latents in any of the known layouts; anything else is a ``UsageError``."""
    if existing(path, "latents").is_file():
        return _load_tree(config, _zip_tree(path), name, EDM2)
    if (path / META).is_file():
        data = load_shards(config, path, name)
        if data.latent is None:
            raise UsageError(f"{path} holds shards of images: data.kind=shards reads them")
        shift, scale = data.latent.shift.flatten().tolist(), data.latent.scale.flatten().tolist()
        return replace(data, latent=_scaling(config, path, data.shape[0], shift, scale, data.latent.moments))
    files = sorted(path.glob("*.safetensors"))
    if files:
        return _load_lightning(config, path, name, files)
    for folder, statistics in ((path / "vae-sd", REPA), (path, EDM2)):
        if next(folder.rglob("*.npy"), None) is not None:
            return _load_tree(config, _folder_tree(folder), name, statistics)
    raise UsageError(f"{path} holds no latents: no {META}, no *.safetensors and no *.npy")


def _load_lightning(config: LatentsConfig, path: Path, name: str, files: Sequence[Path]) -> Dataset:
    present = tensor_names(files[0])
    keys = ["latents", *(key for key in ("latents_flip", "labels") if key in present)]
    parts: dict[str, list[Tensor]] = {key: [] for key in keys}
    for file in files:
        tensors = map_tensors(file, keys)
        first = parts["latents"][0] if parts["latents"] else tensors["latents"]
        for key, tensor in tensors.items():
            latents = key != "labels"
            if len(tensor) != len(tensors["latents"]) or (latents and tensor.shape[1:] != first.shape[1:]):
                raise UsageError(f"{file}: {key} of shape {list(tensor.shape)} do not go with {list(first.shape)}")
            parts[key].append(tensor)
    shape = parts["latents"][0].shape
    if len(shape) != 4:
        raise UsageError(f"{files[0]}: latents are [N, C, H, W], not {list(shape)}")
    shift, scale = _statistics(path / STATISTICS)
    latent = _scaling(config, path, shape[1], shift, scale, None)
    return assemble(config, path, name, "latents", parts, None, latent)


def _statistics(file: Path) -> tuple[list[float] | None, list[float] | None]:
    """Shift and scale from LightningDiT's mean and std; None where there is no such file."""
    if not file.is_file():
        return None, None
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever it meets
        raise UsageError(f"{file} is damaged, or holds more than tensors") from error
    with damage(file):
        mean, std = (torch.as_tensor(found[key]).double().flatten() for key in ("mean", "std"))
        return mean.tolist(), std.reciprocal().tolist()


def _scaling(
    config: LatentsConfig,
    path: Path,
    channels: int,
    shift: Sequence[float] | None,
    scale: Sequence[float] | None,
    moments: Literal["std", "logvar"] | None,
) -> LatentScale:
    """What the config says of shift and scale, else what the files say; neither is a ``UsageError``."""
    found = []
    for option, given, default in (("shift", config.shift, shift), ("scale", config.scale, scale)):
        value = default if given is None else given
        if value is None:
            raise UsageError(
                f"{path} has no {STATISTICS} and says nothing of a scale: set data.shift and data.scale (a sample is "
                "(latent - shift) * scale)"
            )
        values = [float(value)] * channels if isinstance(value, int | float) else list(value)
        if len(values) != channels:
            raise UsageError(f"{path}: {len(values)} values of data.{option} for latents of {channels} channels")
        found.append(values)
    return LatentScale.of_channels(found[0], found[1], moments)


# EDM2 and REPA: one file per image -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """Files of one latent each: their relative names, what reads one, and a ``dataset.json`` or None."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]
    manifest: bytes | None


class _Files(OnDisk):
    """Rows of which each is a file."""

    def __init__(self, tree: _Tree, names: Sequence[str]) -> None:
        self._tree, self._names = tree, names
        first = self._array(0)
        super().__init__((len(names), *first.shape), torch.from_numpy(first).dtype)

    def take(self, rows_B: Tensor, out: Tensor) -> Tensor:
        for place, row in enumerate(rows_B.tolist()):
            array = self._array(row)
            if array.shape != tuple(self.shape[1:]):
                where = self._tree.path
                raise UsageError(
                    f"{where}/{self._names[row]} is {list(array.shape)} and {where}/{self._names[0]} is "
                    f"{list(self.shape[1:])}: latents are of one shape"
                )
            out[place] = torch.from_numpy(array)
        return out

    def _array(self, row: int) -> np.ndarray:
        file = f"{self._tree.path}/{self._names[row]}"
        try:
            array = np.load(io.BytesIO(self._tree.read(self._names[row])), allow_pickle=False)
        except (ValueError, *DAMAGE) as error:
            reason = " ".join(str(error).split()).partition(" If you trust")[0][:120]
            raise UsageError(f"{file} cannot be read as an array: {reason}") from error
        if array.ndim != 3 or len(array) % 2 or array.dtype.kind != "f":
            raise UsageError(f"{file} is {array.dtype} {list(array.shape)}: not a mean and a deviation [2 C, H, W]")
        return array


def _folder_tree(folder: Path) -> _Tree:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.npy"))
    manifest = folder / MANIFEST
    content = manifest.read_bytes() if manifest.is_file() else None
    return _Tree(folder, names, lambda name: (folder / name).read_bytes(), content)


def _zip_tree(path: Path) -> _Tree:
    archive = open_archive(path)
    members = archive.namelist()
    names = sorted(name for name in members if name.endswith(".npy"))
    if not names:
        raise UsageError(f"{path} holds no latents (*.npy)")
    content = read_member(archive, MANIFEST, path) if MANIFEST in members else None
    return _Tree(path, names, archive.read, content)


def _load_tree(config: LatentsConfig, tree: _Tree, name: str, statistics: Statistics) -> Dataset:
    if config.flip:
        raise UsageError(f"data.flip: {tree.path} holds no mirrored latents, and a latent cannot be mirrored itself")
    known = None if tree.manifest is None else read_manifest(tree.manifest, f"{tree.path}/{MANIFEST}")
    present = set(tree.names)
    absent = next((each for each in known or () if each not in present), None)
    if absent is not None:
        raise UsageError(f"{tree.path}/{absent} is missing")
    numbers, class_names = tree_labels(tree.names, known, tree.manifest is not None)
    names = [f"{tree.path}/{each}" for each in tree.names]
    label, num_classes = checked_labels(numbers, names, str(tree.path), config.labels)
    x = _Files(tree, tree.names[: config.max_images])
    channels = x.shape[1] // 2
    shift, scale = statistics if channels == len(EDM2[0]) else (None, None)
    return Dataset(
        name,
        x,
        None if label is None else label[: config.max_images],
        num_classes,
        kind="latents",
        latent=_scaling(config, tree.path, channels, shift, scale, "std"),
        resident=config.resident,
        class_names=class_names if num_classes else (),
    )
