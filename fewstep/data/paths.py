"""Where data lie: variables in paths, patterns, folders of archives, and what to call the data."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fewstep.errors import UsageError, nearest

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?![a-z])", re.IGNORECASE)
_COMMON = re.compile(r"(train|test|val|valid|validation|dev|data|images?|latents?|shards?|\d+).*", re.IGNORECASE)


def expanded(path: str) -> Path:
    """A path with its ``$VARIABLE``s and its ``~`` replaced. A variable that is not set is a ``UsageError``."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not os.environ.get(name):
            raise UsageError(f"data.path {path}: the environment variable {name} is not set")
        return os.environ[name]

    return Path(_VARIABLE.sub(value, path)).expanduser()


def short_name(path: Path) -> str:
    """What data at ``path`` are called by default: its last part, with the folder's name before one that says little.

    ``imagenet64.zip`` is imagenet64, ``cifar10/train.parquet`` is cifar10-train.
    """
    stem = path.name.split(".")[0].rstrip("-_*?[") or path.name
    parent = path.parent.name
    return f"{parent}-{stem}" if parent and _COMMON.fullmatch(stem) else stem


def existing(path: Path, what: str) -> Path:
    """The path, if something is there; else a ``UsageError`` with the nearest name beside it."""
    if path.exists():
        return path
    place = next(folder for folder in path.parents if folder.exists())
    missing = path.relative_to(place).parts[0]
    beside = sorted(os.listdir(place)) if place.is_dir() else []
    hint = f"; {nearest(missing, beside)}" if beside and len(beside) < 20 else f": there is no {missing} in {place}"
    raise UsageError(f"no {what} at {path}{hint}")


def archives(path: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The files that a path stands for: itself, what matches a pattern, or what a folder holds, in order of name.

    None at all, or a folder that mixes training with test files, is a ``UsageError``.
    """
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path)))
        if not found:
            raise UsageError(f"no {what} matches {path}")
        return found
    if not existing(path, what).is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and not file.name.startswith("."))
    if not found:
        raise UsageError(f"{path} holds no {what} ({', '.join(suffixes)})")
    splits = _splits(found)
    if len(splits) > 1:
        raise UsageError(f"{path} holds several sets ({', '.join(splits)}): name one, such as {path}/{splits[-1]}*")
    return found


def _splits(files: Iterable[Path]) -> list[str]:
    return sorted({found[1] for file in files if (found := _SPLIT.match(file.name))})
