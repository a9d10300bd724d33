"""From a data config to a data set. Nothing here touches a network."""

from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from fewstep.data.config import DataConfig, FilesConfig, ImagesConfig, LatentsConfig, ShardsConfig, ToyConfig
from fewstep.data.dataset import Dataset
from fewstep.data.embedding_files import load_embeddings
from fewstep.data.encoded import Encoded, load_images
from fewstep.data.folder import open_folder
from fewstep.data.latents import load_latents
from fewstep.data.parquet import open_parquet
from fewstep.data.paths import expanded, short_name
from fewstep.data.shards import load_shards
from fewstep.data.tar import open_tar
from fewstep.data.toys import TOYS
from fewstep.data.zipped import open_zip
from fewstep.errors import UsageError


def load_data(config: DataConfig) -> Dataset:
    """The data a config asks for, in memory or mapped into it. What is wrong with them is a ``UsageError``."""
    data = LOADS[config.kind](config)
    if isinstance(config, FilesConfig) and config.num_classes is not None:
        if config.num_classes < data.num_classes or not data.num_classes:
            raise UsageError(f"data.num_classes {config.num_classes}: the data show {data.num_classes} classes")
        data = replace(data, num_classes=config.num_classes)
    if not isinstance(config, FilesConfig) or config.embeddings is None:
        return data
    rows = load_embeddings(expanded(config.embeddings), len(data.x), first=config.max_images is not None)
    return replace(data, label=None, num_classes=0, class_names=(), embeddings=rows)


def open_images(config: ImagesConfig) -> Encoded:
    """The encoded images of a config, before any of them is read."""
    return OPENS[config.kind](config, expanded(config.path))  # type: ignore[attr-defined]


def data_name(config: FilesConfig) -> str:
    """What data in files are called."""
    return config.name or short_name(expanded(config.path))


def digits() -> Dataset:
    """The UCI handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0), shipped with the package: ``x [1797, 1, 8,
    8]``.

    Grey values 0 to 16 become [-1, 1].
    """
    tensors = load_safetensors((files("fewstep.data") / "digits.safetensors").read_bytes())
    x = tensors["images"].to(torch.float32).div(8).sub(1).unsqueeze(1)
    return Dataset("digits", x, tensors["labels"].to(torch.int64), num_classes=10, kind="image")


def _digits(config: object) -> Dataset:
    return digits()


def _toy(config: ToyConfig) -> Dataset:
    toy = TOYS[config.name](config.count, config.seed)
    label = toy.label if config.classes else None
    num_classes = 0 if label is None else int(label.max()) + 1
    return Dataset(f"toy-{config.name}", toy.x, label, num_classes, kind="points")


def _images(config: ImagesConfig) -> Dataset:
    return load_images(open_images(config), config, data_name(config))


def _shards(config: ShardsConfig) -> Dataset:
    return load_shards(config, expanded(config.path), data_name(config))


def _latents(config: LatentsConfig) -> Dataset:
    return load_latents(config, expanded(config.path), data_name(config))


OPENS: dict[str, Callable[[Any, Path], Encoded]] = {
    "folder": open_folder,
    "zip": open_zip,
    "parquet": open_parquet,
    "webdataset": open_tar,
}
"""What lists the encoded images of each kind of source."""

LOADS: dict[str, Callable[[Any], Dataset]] = {
    "digits": _digits,
    "toy": _toy,
    "folder": _images,
    "zip": _images,
    "parquet": _images,
    "webdataset": _images,
    "shards": _shards,
    "latents": _latents,
}
"""What loads each kind of data."""
