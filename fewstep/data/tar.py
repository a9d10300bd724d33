"""WebDataset: tar archives in which the files of a sample share a name up to the first dot.

``000017.jpg`` is the image of sample 000017, and its label is a whole number in ``000017.cls``, in ``000017.txt``, or
under "label" (or "cls", "class") in ``000017.json``.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fewstep.data.config import WebDatasetConfig
from fewstep.data.encoded import Encoded
from fewstep.data.images import SUFFIXES, BrokenImage
from fewstep.data.paths import archives
from fewstep.errors import UsageError

LABEL_SUFFIXES = (".cls", ".json", ".txt")
_JSON_KEYS = ("label", "cls", "class")
_WHOLE = re.compile(r"-?[0-9]+")

Read = Callable[[], bytes]


@dataclass
class _Sample:
    """The files of one key by suffix, each with what reads it."""

    name: str
    files: dict[str, Read] = field(default_factory=dict)


def open_tar(config: WebDatasetConfig, path: Path) -> Encoded:
    """The images of one archive or several, in the order of the archives' names and of the keys within each."""
    samples: list[_Sample] = []
    for archive in archives(path, (".tar", ".tar.gz", ".tgz"), "tar archives"):
        samples += _samples(archive)
    if not any(_image(sample) for sample in samples):
        raise UsageError(f"{path} holds no images ({', '.join(SUFFIXES)})")

    def read(i: int) -> bytes:
        found = _image(samples[i])
        if found is None:
            raise BrokenImage("has no image")
        return found()

    label = None if config.labels is False else _labels(samples)
    return Encoded(str(path), [sample.name for sample in samples], label, read)


def _samples(archive: Path) -> list[_Sample]:
    """All samples of an archive in the order of their keys. Compressed archives are held in memory."""
    samples: dict[str, _Sample] = {}
    try:
        tar, compressed = _open(archive)
        with tar:
            for member in tar:
                place = PurePosixPath(member.name)
                stem, dot, suffix = place.name.partition(".")
                if not (member.isreg() and stem and dot):
                    continue
                key = str(place.with_name(stem))
                sample = samples.setdefault(key, _Sample(f"{archive}/{key}"))
                read = _held(tar, member) if compressed else _at(archive, member.offset_data, member.size)
                sample.files["." + suffix.lower()] = read
    except (tarfile.TarError, EOFError, zlib.error) as error:
        detail = str(error).partition("\n")[0].rstrip(":")  # the rest says what each kind of compression thinks
        raise UsageError(f"{archive} is no tar archive, or not all of one: {detail}") from error
    return [samples[key] for key in sorted(samples)]


def _open(archive: Path) -> tuple[tarfile.TarFile, bool]:
    """An archive, and whether it is compressed: then it can be read from its beginning only."""
    try:
        return tarfile.open(archive, "r:"), False
    except tarfile.ReadError:
        return tarfile.open(archive, "r:*"), True


def _image(sample: _Sample) -> Read | None:
    return next((sample.files[suffix] for suffix in SUFFIXES if suffix in sample.files), None)


def _at(archive: Path, offset: int, size: int) -> Read:
    """Reads part of a file that is opened anew each time: threads share no position."""

    def read() -> bytes:
        with archive.open("rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)

    return read


def _held(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Read:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    return lambda: content


def _labels(samples: list[_Sample]) -> list[int | None] | None:
    """The label of each sample. Where none has a whole number (texts are often captions) there are no labels."""
    label = [_label(sample) for sample in samples]
    return None if all(each is None for each in label) else label


def _label(sample: _Sample) -> int | None:
    suffix = next((suffix for suffix in LABEL_SUFFIXES if suffix in sample.files), None)
    if suffix is None:
        return None
    text = sample.files[suffix]().decode(errors="replace")
    if suffix != ".json":
        word = text.strip()
        if suffix == ".cls" and not _WHOLE.fullmatch(word):
            raise UsageError(f"{sample.name}.cls holds {word[:40]!r}, which is no whole number")
        return int(word) if _WHOLE.fullmatch(word) else None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{sample.name}.json is damaged: {error}") from error
    found = document
    if isinstance(document, dict):
        found = next((document[key] for key in _JSON_KEYS if key in document), None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
