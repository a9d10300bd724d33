"""Files of checkpoints, opened without running what they name: safetensors, ``torch.save``, pickles."""

import argparse
import collections
import hashlib
import pathlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from fewstep.errors import UsageError
from fewstep.inert import Module, Reader, plain, strangers

FileKind = Literal["safetensors", "torch", "pickle"]

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of ``torch.save`` before torch 1.6 begin: a pickle of a number of their own."""


class UntrustedPickle(UsageError):
    """A file names what would run as code. ``names`` are those names."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.names = tuple(names)
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        super().__init__(
            f"{path} names {shown}, which would run as code: if you trust whoever made it, say --trust-pickle "
            "(teacher.trust_pickle: true)"
        )


@dataclass(frozen=True)
class Opened:
    """A checkpoint file as it is: ``tree`` is what it holds, in dictionaries and lists, with state dicts in the place
    of modules. ``said`` is what it says of how its network was made: the keyword arguments and ``class_name`` of the
    module that it holds, or its ``args``. ``digest`` is the SHA-256 of the file."""

    tree: Any
    said: Mapping[str, Any]
    kind_of_file: FileKind
    digest: str


def open_checkpoint(path: Path, *, trust: bool = False) -> Opened:
    """Read a file. With ``trust``, what cannot be read without running it is run.

    What is missing, damaged or no checkpoint is a ``UsageError``; what would have to be run without ``trust`` an
    ``UntrustedPickle``.
    """
    path = Path(path)
    kind = kind_of_file(path)
    found = {"safetensors": read_safetensors, "torch": read_torch, "pickle": read_plain}[kind](path, trust=trust)
    try:
        tree = plain(found)
    except Exception as error:  # it has the form of a pickle, and may hold anything
        raise _damaged(path, error) from error
    if not isinstance(tree, dict | Module):
        raise UsageError(f"{path} holds a {type(tree).__name__}, not a checkpoint")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Opened(_without_modules(tree), _said(tree), kind, digest)


def kind_of_file(path: Path) -> FileKind:
    """By how a file begins. What is missing or begins as none of them is a ``UsageError``."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not the file of a checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY))
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise UsageError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04") or head == LEGACY:
        return "torch"
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size):
        return "safetensors"
    if head[0] == 0x80 and len(head) > 1 and head[1] <= pickle.HIGHEST_PROTOCOL:
        return "pickle"
    raise UsageError(f"{path} is neither safetensors, nor a file of torch.save, nor a pickle: it begins with {head!r}")


def read_safetensors(path: Path, *, trust: bool = False) -> Any:
    """Tensors by name. They name nothing that could run."""
    try:
        return load_file(path)
    except Exception as error:  # its own, and those of json
        raise _damaged(path, error) from error


def read_torch(path: Path, *, trust: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors stay in the file until they are used, where its format allows that. Settings
    kept beside them (``argparse.Namespace``, paths, numpy's numbers) are read, as dictionaries, texts and numbers."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about archives of TorchScript, which are refused
        try:
            return _settings(torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped or None))
        except Exception as error:
            names = _named(path, zipped)
            if not names or not trust:
                raise (UntrustedPickle(path, names) if names else _damaged(path, error)) from error
    return _run(path, lambda: torch.load(str(path), map_location="cpu", weights_only=False))


def read_plain(path: Path, *, trust: bool = False) -> Any:
    """What ``pickle.dump`` wrote, as records of which ``plain`` makes data: nothing that it names is looked up."""
    with path.open("rb") as file:
        reader = Reader(file)
        try:
            found, error = reader.load(), None
        except Exception as raised:
            found, error = None, raised
    names = sorted(reader.strangers)
    if names and not trust:
        raise UntrustedPickle(path, names) from error
    if error is not None and not names:
        raise _damaged(path, error) from error
    return _run(path, lambda: pickle.loads(path.read_bytes())) if names else found


def _named(path: Path, zipped: bool) -> list[str]:
    """What reading a file of ``torch.save`` would look up, beyond what is harmless; nothing if that cannot be told."""
    try:
        if zipped:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        with path.open("rb") as file:
            return sorted(strangers(file))
    except Exception:  # damaged, which the caller knows
        return []


def _harmless() -> list[Any]:
    """Beyond what torch knows as such: what settings are kept in."""
    numbers = [type(np.dtype(code)) for code in ("?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d")]
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    old = [(scalar, "numpy.core.multiarray.scalar"), (array, "numpy.core.multiarray._reconstruct")]
    new = [(scalar, "numpy._core.multiarray.scalar"), (array, "numpy._core.multiarray._reconstruct")]
    paths = [pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath]
    return [argparse.Namespace, *paths, collections.OrderedDict, np.dtype, np.ndarray, *numbers, *old, *new]


def _settings(found: Any) -> Any:
    """Namespaces as dictionaries, paths as texts, numpy's numbers as Python's, its arrays as tensors."""
    if isinstance(found, argparse.Namespace):
        return _settings(vars(found))
    if isinstance(found, pathlib.PurePath):
        return str(found)
    if isinstance(found, np.generic):
        return found.item()
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found) if found.dtype.kind in "biufc" else found.tolist()
    if isinstance(found, Mapping):
        return {key: _settings(item) for key, item in found.items()}
    if type(found) in (list, tuple):
        return type(found)(_settings(item) for item in found)
    return found


def _run(path: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns, which runs what the file says. That fails as it likes: a ``UsageError``."""
    try:
        return _settings(read())
    except Exception as error:
        raise UsageError(f"{path} is trusted and fails: {_shown(error)}") from error


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} is cut short or damaged, or of another kind: {_shown(error)}")


def _shown(error: Exception) -> str:
    # Torch opens with advice that does not fit here; what it found comes after these words.
    said = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


def _without_modules(tree: Any) -> Any:
    if isinstance(tree, Module):
        return tree.state
    if isinstance(tree, dict):
        return {key: _without_modules(item) for key, item in tree.items()}
    return [_without_modules(item) for item in tree] if isinstance(tree, list) else tree


def _said(tree: Any) -> dict[str, Any]:
    """Of the averaged module, or else of the first; without a module the settings of the run."""
    if isinstance(tree, Module):
        return {**tree.init_kwargs, "class_name": tree.class_name}
    if not isinstance(tree, dict):
        return {}
    modules = {key: item for key, item in tree.items() if isinstance(item, Module)}
    if modules:
        return _said(modules.get("ema", next(iter(modules.values()))))
    return dict(tree["args"]) if isinstance(tree.get("args"), dict) else {}
