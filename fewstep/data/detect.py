"""What lies at a path, by looking: from there to a data config."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fewstep.data.config import (
    DataConfig,
    FilesConfig,
    FolderConfig,
    LatentsConfig,
    ParquetConfig,
    ShardsConfig,
    WebDatasetConfig,
    ZipConfig,
)
from fewstep.data.folder import is_image
from fewstep.data.paths import existing
from fewstep.data.shards import META, read_meta
from fewstep.data.zipped import open_archive
from fewstep.errors import UsageError

CONFIGS: dict[str, type[FilesConfig]] = {
    "folder": FolderConfig,
    "zip": ZipConfig,
    "parquet": ParquetConfig,
    "webdataset": WebDatasetConfig,
    "shards": ShardsConfig,
    "latents": LatentsConfig,
}
TAR = (".tar", ".tar.gz", ".tgz")


def detect(path: Path) -> str:
    """The kind of data at a path; what is of no kind is a ``UsageError``.

    A pattern such as ``train-*.tar`` is told by its ending.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(TAR):
        return "webdataset"
    if existing(path, "data").is_file():
        if name.endswith(".zip"):
            return "latents" if any(member.endswith(".npy") for member in open_archive(path).namelist()) else "zip"
        raise UsageError(f"{path} is no data of a known kind: .zip, .tar, .parquet, or a folder")
    if (path / META).is_file():
        return "shards" if read_meta(path).get("kind") == "images" else "latents"
    if (path / "vae-sd").is_dir():  # REPA's, beside the images
        return "latents"
    for file in path.rglob("*"):  # the first that tells
        relative = file.relative_to(path).as_posix()
        if is_image(relative):
            return "folder"
        for endings, kind in (((".parquet",), "parquet"), (TAR, "webdataset"), ((".npy", ".safetensors"), "latents")):
            if file.name.endswith(endings) and not file.name.startswith("."):
                return kind
    raise UsageError(f"{path} holds no data of a known kind: images, .parquet, .tar, or latents (.npy, .safetensors)")


def data_config(path: str, kind: str, **options: Any) -> DataConfig:
    """The config of data of a kind. Options that this kind does not have are a ``UsageError``; None leaves one out."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return CONFIGS[kind].model_validate({"kind": kind, "path": path, **given})  # type: ignore[return-value]
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        option = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            raise UsageError(f"{path} is data of kind {kind}, which has no {option}") from error
        raise UsageError(f"data.{option}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from error
