"""Small files on disk: atomic writes, JSON, digests. Imports no torch."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import UsageError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write under a temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return document


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
