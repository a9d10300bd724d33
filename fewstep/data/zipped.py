"""Zip archives of images: EDM's and StyleGAN's data sets, or a folder of classes that was zipped."""

import zipfile
import zlib
from pathlib import Path

from fewstep.data.config import ZipConfig
from fewstep.data.encoded import Encoded
from fewstep.data.folder import MANIFEST, is_image
from fewstep.data.images import SUFFIXES, BrokenImage
from fewstep.data.labels import read_manifest, tree_labels
from fewstep.data.paths import existing
from fewstep.errors import UsageError

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)
"""What a damaged, encrypted or exotic member raises when it is read."""


def open_archive(path: Path) -> zipfile.ZipFile:
    """A zip archive for reading; what is none, or cut short, is a ``UsageError``."""
    if existing(path, "zip archive").is_dir():
        raise UsageError(f"{path} is a folder and no zip archive: data.kind=folder may read it")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path} is no zip archive, or not all of one: {error}") from error


def open_zip(config: ZipConfig, path: Path) -> Encoded:
    """The images of an archive in the order of their paths in it."""
    archive = open_archive(path)
    members = set(archive.namelist())
    names = sorted(filter(is_image, members))
    if not names:
        raise UsageError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    has_manifest = MANIFEST in members and config.labels is not False
    known = read_manifest(read_member(archive, MANIFEST, path), f"{path}/{MANIFEST}") if has_manifest else None
    label, class_names = tree_labels(names, known, has_manifest)

    def read(i: int) -> bytes:
        try:
            return archive.read(names[i])
        except DAMAGE as error:
            raise BrokenImage(f"cannot be read ({error})") from error

    missing = tuple(f"{path}/{name}" for name in known or () if name not in members)
    return Encoded(str(path), [f"{path}/{name}" for name in names], label, read, class_names, missing)


def read_member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """The bytes of a member that the rest depends on: damage is a ``UsageError``."""
    try:
        return archive.read(name)
    except DAMAGE as error:
        raise UsageError(f"{path}/{name} cannot be read: {error}") from error
