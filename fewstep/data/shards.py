"""fewstep's own data format: safetensors shards that are read through the memory map, and a ``meta.json``.

A folder holds ``shard-00000.safetensors`` and so on, each with ``images`` uint8 ``[n, C, H, W]`` or ``latents``
float16, ``latents_flip`` (those of the mirrored images) and ``labels`` int64 where there are any. ``meta.json`` says
what they are, and has the digest of each shard and one of the content, which depends neither on how it is cut into
shards nor on where it came from.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.config import LatentsConfig, ShardsConfig
from fewstep.data.dataset import Dataset, LatentScale
from fewstep.data.labels import checked_labels
from fewstep.data.paths import existing
from fewstep.data.rows import joined
from fewstep.errors import UsageError
from fewstep.files import read_json

META = "meta.json"
SCHEMA = 1
FORMS = {"images": torch.uint8, "latents": torch.float16}
"""What shards hold, by the name of the tensor."""


def load_shards(config: ShardsConfig | LatentsConfig, path: Path, name: str) -> Dataset:
    """The data of a folder of shards, mapped into memory. Their digests are not checked here, which would read all."""
    meta = read_meta(path)
    file = path / META
    with damage(file):
        kind, shape, num_classes = str(meta["kind"]), tuple(map(int, meta["shape"])), int(meta["num_classes"])
        form = FORMS[kind]
        latent = None if kind == "images" else LatentScale.from_json(meta["latent"])
        shards = [(path / str(shard["file"]), int(shard["count"])) for shard in meta["shards"]]
        class_names, keys = tuple(map(str, meta["class_names"])), [kind]
        keys += [key for key in ("latents_flip", "labels") if meta["has"][key]]
    parts: dict[str, list[Tensor]] = {key: [] for key in keys}
    for shard, count in shards:
        tensors = map_tensors(shard, keys)
        for key, tensor in tensors.items():
            expected = ((count,), torch.int64) if key == "labels" else ((count, *shape), form)
            if (tuple(tensor.shape), tensor.dtype) != expected:
                raise UsageError(f"{shard} is damaged: its {key} are {tensor.dtype} {list(tensor.shape)}")
            parts[key].append(tensor)
    facts = {key: meta.get(key) for key in ("source", "digest", "autoencoder")}
    return assemble(config, path, name, kind, parts, num_classes, latent, class_names, facts)


def assemble(
    config: ShardsConfig | LatentsConfig,
    path: Path,
    name: str,
    key: str,
    parts: dict[str, list[Tensor]],
    num_classes: int | None,
    latent: LatentScale | None,
    class_names: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
) -> Dataset:
    """A data set from the tensors of shards by name, as the config wants it. ``num_classes`` None: count them."""
    label = None
    if "labels" in parts and config.labels is not False:
        label = torch.cat(parts["labels"]).to(torch.int64)
        if num_classes is None:
            label, num_classes = checked_labels(label.tolist(), [], str(path), config.labels)
        elif len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
            raise UsageError(f"{path} is damaged: it has labels outside of its {num_classes} classes")
        label = None if label is None else label[: config.max_images]
    elif config.labels:
        raise UsageError(f"{path} has no labels: leave out data.labels=true")
    if config.flip and latent is not None and "latents_flip" not in parts:
        raise UsageError(f"data.flip: {path} holds no mirrored latents, and a latent cannot be mirrored itself")
    return Dataset(
        name,
        joined(parts[key], config.max_images),
        label,
        0 if label is None else num_classes or 0,
        kind="image" if latent is None else "latents",
        latent=latent,
        mirrored=joined(parts["latents_flip"], config.max_images) if "latents_flip" in parts else None,
        flip=config.flip,
        resident=config.resident,
        class_names=class_names if label is not None else (),
        facts=facts or {},
    )


def read_meta(path: Path) -> dict[str, Any]:
    """The ``meta.json`` of a folder of shards; anything else is a ``UsageError``."""
    file = existing(path, "folder of shards") / META
    if not file.is_file():
        raise UsageError(f"{path} holds no shards of fewstep: it has no {META} (`fewstep data prepare` makes them)")
    meta = read_json(file)
    if meta.get("format") != "fewstep-data":
        raise UsageError(f"{file} is not of fewstep's shards (`fewstep data prepare` makes them)")
    if meta.get("schema") != SCHEMA:
        raise UsageError(f"{file} has schema {meta.get('schema')!r}; this version reads {SCHEMA}")
    return meta


def tensor_names(shard: Path) -> set[str]:
    """The names of the tensors in a safetensors file."""
    with damage(shard), safe_open(shard, framework="pt") as file:
        return set(file.keys())


def map_tensors(shard: Path, keys: list[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file through the memory map: nothing is read before it is used."""
    if not shard.is_file():
        raise UsageError(f"{shard} is missing")
    present = tensor_names(shard)
    with damage(shard), safe_open(shard, framework="pt") as file:
        absent = [key for key in keys if key not in present]
        if absent:
            raise UsageError(f"{shard} has no {absent[0]} ({', '.join(sorted(present))})")
        return {key: file.get_tensor(key) for key in keys}


def verify(path: Path) -> None:
    """Read every shard and compare its digest with the one recorded: a ``UsageError`` names the first that differs."""
    verify_shards(path, read_meta(path))


def verify_shards(path: Path, meta: Mapping[str, Any]) -> None:
    """The same by a ``meta.json`` that has been read."""
    for shard in meta["shards"]:
        file = path / shard["file"]
        with file.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != shard["digest"]:
                raise UsageError(f"{file} is damaged: its digest is not the one recorded in {META}")


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong while the contents of a file are taken apart is a ``UsageError`` that names it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged: {' '.join(str(error).split())[:160]}") from error
