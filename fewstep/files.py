"""Small files on disk: atomic writes, JSON, digests. Imports no torch."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, UsageError

FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskError(FewstepError, OSError):
    """What a disk refuses, and where. Exit code 1 for a full or failing disk, else 2: the user gave the place.

    An ``OSError`` as well, so that its ``errno`` can be asked for.
    """

    def __init__(self, error: OSError, path: Path | str) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.exit_code = 1 if error.errno in (*FULL, errno.EIO) else 2

    def __str__(self) -> str:
        path = str(self.filename)
        return f"{self.strerror}: {path if len(path) < 200 else path[:200] + '...'}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Whatever the disk refuses while ``path`` is written is a ``DiskError`` naming it: the system often names nothing,
    or a temporary file."""
    try:
        yield
    except OSError as error:
        raise DiskError(error, path) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, flush to disk, rename, flush the folder. A ``DiskError`` leaves what was there."""
    temporary = temporary_for(path)
    with disk_errors(path):
        make_folder(path.parent)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error counts
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def temporary_for(path: Path) -> Path:
    """Where this process writes what becomes ``path`` by renaming."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a process that was killed may have left this behind (see ``temporary_for``)."""
    return re.fullmatch(r"\..+\.[0-9]+\.tmp", path.name) is not None


def make_folder(path: Path) -> None:
    """Make a folder and its parents so that they outlast a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's names to disk, where the system can: Windows and some network disks cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (*FULL, errno.EIO):
            raise


def overwrite_json(path: Path, document: Mapping[str, Any], *, shorten: str) -> None:
    """Write a JSON object over a file, in the room that this file already has: for a full disk.

    Not atomic. The text ``document[shorten]`` is cut to what fits, and the rest of the file becomes blanks.
    """
    with disk_errors(path), path.open("r+b", buffering=0) as file:
        status = os.fstat(file.fileno())
        # The blocks are the file's own, used or not. Disks that compress or copy on write count them differently.
        for room in (getattr(status, "st_blocks", 0) * 512, status.st_size):
            content = _fitting(document, shorten, room)
            with suppress(OSError):
                file.seek(0)
                content = content.ljust(os.fstat(file.fileno()).st_size)
                if len(content.rstrip()) <= room and file.write(content) == len(content):
                    os.fsync(file.fileno())
                    return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fitting(document: Mapping[str, Any], shorten: str, room: int) -> bytes:
    """The document as JSON of at most ``room`` bytes, as far as cutting one text can do that."""
    text = str(document[shorten])[:room]
    while True:
        content = json.dumps(_finite({**document, shorten: text}), separators=(",", ":")).encode()
        if len(content) <= room or not text:
            return content
        text = text[:-1]


def check_folder(path: Path) -> None:
    """Before work that ends there: a ``UsageError`` unless a folder can be made and written at ``path``."""
    existing = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not existing.is_dir():
        raise UsageError(f"cannot write to {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {path}: no permission for {existing}")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, numbers that are not finite as null."""
    write_atomic(path, json_text(document))


def json_text(document: Mapping[str, Any]) -> str:
    """Indented JSON. JSON has no NaN: what is not finite becomes null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(document: Any) -> Any:
    if isinstance(document, Mapping):
        return {key: _finite(item) for key, item in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(item) for item in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing or broken file is a ``UsageError``."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no {path}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or numbers and depths without end
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return document


def cache_folder() -> Path:
    """Where what was converted once is kept: ``$FEWSTEP_CACHE``, else ``fewstep`` in the user's cache."""
    given = os.environ.get("FEWSTEP_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
