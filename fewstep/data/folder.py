"""Folders of images: class folders, a flat folder, or any tree with EDM's ``dataset.json``."""

import os
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.config import FolderConfig
from fewstep.data.encoded import Encoded
from fewstep.data.images import SUFFIXES, BrokenImage
from fewstep.data.labels import read_manifest, tree_labels
from fewstep.data.paths import existing
from fewstep.errors import UsageError

MANIFEST = "dataset.json"


def open_folder(config: FolderConfig, path: Path) -> Encoded:
    """The images below a folder in the order of their relative paths."""
    if not existing(path, "folder of images").is_dir():
        raise UsageError(f"{path} is a file and no folder of images: data.kind={_kind_of(path)} may read it")
    names = sorted(_images(path, ""))
    if not names:
        raise UsageError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    manifest = path / MANIFEST
    has_manifest = manifest.is_file() and config.labels is not False
    known = read_manifest(manifest.read_bytes(), str(manifest)) if has_manifest else None
    label, class_names = tree_labels(names, known, has_manifest)
    if class_names and config.labels is not False:
        _check_classes(path, class_names)
    files = [path / name for name in names]

    def read(i: int) -> bytes:
        try:
            return files[i].read_bytes()
        except OSError as error:
            raise BrokenImage(f"cannot be read ({error.strerror})") from error

    present = set(names)
    missing = tuple(str(path / name) for name in known or () if name not in present)
    return Encoded(str(path), [str(file) for file in files], label, read, class_names, missing)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and none of those that systems leave lying about."""
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _images(folder: Path, prefix: str) -> Iterator[str]:
    """Relative paths of all images below a folder, with / on every system."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _images(Path(entry.path), f"{prefix}{entry.name}/")
            elif is_image(prefix + entry.name) and (entry.is_file() or not os.path.exists(entry.path)):
                yield prefix + entry.name


def _check_classes(path: Path, class_names: tuple[str, ...]) -> None:
    """An empty class folder would shift the numbers of those after it."""
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child.name not in class_names:
            raise UsageError(f"the class folder {child} holds no images: fill or remove it, or set data.labels=false")


def _kind_of(path: Path) -> str:
    return {".zip": "zip", ".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix, "zip")
