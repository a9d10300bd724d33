"""Pickles read without running anything that they name.

A pickle is a program: it names functions of any module and calls them. Here no name is ever looked up. Each of those in
the table below stands for a function of this file that keeps what it is given; every other name stands for a ``Record``
that does nothing, and is noted. Nothing on the reader's stack but these, numbers, texts, lists, tuples, sets and
dictionaries can be called, altered or built on.
"""

import io
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Module:
    """A module that a file holds: the name of its class, the keyword arguments that made it as far as the file keeps
    them, and its parameters and persistent buffers under the names and in the order of a state dict."""

    class_name: str
    init_kwargs: dict[str, Any]
    state: dict[str, Tensor]


class _Sealed(type):
    """Pickles may set attributes of whatever they hold: of this class they cannot."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{name} of a class is set")


class Record(metaclass=_Sealed):
    """What stands for an object of a pickle: ``kind`` says for what, ``value`` is what it was made of, ``state`` what
    it was told afterwards."""

    __slots__ = ("kind", "state", "value")

    kind: str
    value: Any
    state: Any

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Record":
        record = object.__new__(cls)
        record.kind, record.value, record.state = "object", None, None
        return record

    def __call__(self, *arguments: Any) -> "Record":
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, item: Any) -> None: ...


class _Dictionary(dict[Any, Any], metaclass=_Sealed):
    """An ordered or easy dictionary. What is said of it beyond its items is let go."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None: ...


class _Maker:
    """A function of this file in the place of one that a pickle names."""

    __slots__ = ("_make",)

    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{name} of a function is set")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function is told a state")


def made(kind: str, value: Any, state: Any = None) -> Record:
    record = Record()
    record.kind, record.value, record.state = kind, value, state
    return record


class Reader(pickle.Unpickler):
    """Reads one pickle of a file. ``strangers`` are the names, in order, that running it would have looked up."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.strangers: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _MAKERS:
            return _MAKERS[full]
        if full == "torch.storage._load_from_bytes":
            return _Maker(self._storage)
        if not _KEPT.fullmatch(full):
            self.strangers[full] = None
        return Record

    def persistent_load(self, pid: Any) -> Record:
        return Record()

    def _storage(self, content: bytes) -> Record:
        """The storage of a tensor, which is a file of ``torch.save`` in itself."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is no such file
                storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:
            found = strangers(io.BytesIO(content))
            self.strangers.update(dict.fromkeys(found))
            if found:
                return Record()
            raise
        if not isinstance(storage, torch.storage.TypedStorage):
            raise pickle.UnpicklingError(f"a {type(storage).__name__} where the storage of a tensor should be")
        return made("storage", storage)


def strangers(file: BinaryIO, pickles: int = 5) -> list[str]:
    """The names that the first ``pickles`` of a file would look up and that stand for nothing here. What is no pickle
    ends the search. An old file of ``torch.save`` has five."""
    found: dict[str, None] = {}
    for _ in range(pickles):
        reader = Reader(file)
        try:
            reader.load()
        except Exception:
            return list(found | reader.strangers)
        found |= reader.strangers
    return list(found)


# ------------------------------------------------------------------------------------------- what the known names make


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Record:
    if not isinstance(storage, Record) or storage.kind != "storage":
        return Record()
    held: torch.storage.TypedStorage = storage.value
    if min((offset, *size, *stride), default=0) < 0 or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of shape {size} with strides {stride}")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and last >= held._size():
        raise pickle.UnpicklingError(f"a tensor of shape {size} in a storage of {held._size()} numbers")
    return made("tensor", torch._utils._rebuild_tensor_v2(held, offset, size, stride, False, {}))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _dictionary(items: Any = ()) -> _Dictionary:
    return _Dictionary(items if isinstance(items, dict) else dict(items))


def _persistent(meta: Any) -> Record:
    if not isinstance(meta, dict):
        raise pickle.UnpicklingError("a persistent object without a description")
    return made("persistent", str(meta.get("class_name")), meta.get("state"))


def _dtype(code: Any, *_: Any) -> Record:
    return made("dtype", str(code))


def _number(dtype: Any, content: Any = b"") -> Any:
    return np.frombuffer(content, dtype=_numpy(dtype), count=1)[0].item()


def _array(*_: Any) -> Record:
    return made("array", None)


def _buffered(content: Any, dtype: Any, shape: Any, order: str = "C") -> Record:
    return made("array", None, (1, shape, dtype, order == "F", content))


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a text encoded as {encoding}")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    return set(items)


def _numpy(dtype: Any) -> np.dtype[Any]:
    """A dtype of plain numbers. Its state, if it has one, begins with a version and the order of the bytes."""
    if not isinstance(dtype, Record) or dtype.kind != "dtype" or not re.fullmatch(r"[<>|=]?[biufc]\d+", dtype.value):
        raise pickle.UnpicklingError("an array of what are no numbers")
    found = np.dtype(dtype.value)
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
    return found.newbyteorder(order) if order in ("<", ">") else found


_MAKERS: Mapping[str, Any] = {
    "collections.OrderedDict": _Maker(_dictionary),
    "dnnlib.util.EasyDict": _Dictionary,
    "torch_utils.persistence._reconstruct_persistent_obj": _Maker(_persistent),
    "torch._utils._rebuild_tensor": _Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": _Maker(_tensor),
    "torch._utils._rebuild_parameter": _Maker(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Maker(_parameter),
    "numpy.dtype": _Maker(_dtype),
    "numpy.core.multiarray.scalar": _Maker(_number),
    "numpy._core.multiarray.scalar": _Maker(_number),
    "numpy.core.multiarray._reconstruct": _Maker(_array),
    "numpy._core.multiarray._reconstruct": _Maker(_array),
    "numpy.core.numeric._frombuffer": _Maker(_buffered),
    "numpy._core.numeric._frombuffer": _Maker(_buffered),
    "_codecs.encode": _Maker(_encoded),
    "builtins.set": _Maker(_set),
    "__builtin__.set": _Maker(_set),
}

_KEPT = re.compile(
    r"torch\.nn\.modules\.[\w.]+|numpy\.ndarray|torch\.Size|torch\.device|torch\.(cuda\.)?\w+Storage"
    r"|torch\.(bfloat16|bool|float\d+|u?int\d+)"
)
"""Names that a ``Record`` stands for well enough."""


# ------------------------------------------------------------------------------------------- from records to plain data


def plain(found: Any, _seen: dict[int, Any] | None = None) -> Any:
    """What a file holds, as dictionaries, lists, tuples, numbers, texts, tensors and ``Module``s.

    Records of modules become ``Module``; those of other objects what their state says of them. What contains itself is
    a ``ValueError``.
    """
    seen = {} if _seen is None else _seen
    if id(found) in seen:
        if seen[id(found)] is _OPEN:
            raise ValueError("it contains itself")
        return seen[id(found)]
    if not isinstance(found, Record | dict | list | tuple | set | torch.nn.Module):
        return found
    seen[id(found)] = _OPEN
    seen[id(found)] = made_plain = _plain(found, seen)
    return made_plain


_OPEN = object()


def _plain(found: Any, seen: dict[int, Any]) -> Any:
    if isinstance(found, torch.nn.Module):
        arguments = plain(vars(found).get("_init_kwargs"), seen)
        return Module(type(found).__name__, arguments or {}, dict(found.state_dict()))
    if isinstance(found, dict):
        return {key: plain(item, seen) for key, item in dict.items(found)}
    if not isinstance(found, Record):
        items = [plain(item, seen) for item in found]
        return tuple(items) if isinstance(found, tuple) else set(items) if isinstance(found, set) else items
    if found.kind == "tensor":
        return found.value
    if found.kind == "array":
        return _array_of(found.state)
    if found.kind in ("storage", "dtype"):
        return None
    state = found.state if isinstance(found.state, dict) else {}
    if not {"_parameters", "_buffers", "_modules"} <= state.keys():
        return {key: plain(item, seen) for key, item in state.items() if key not in ("_init_args", "_init_kwargs")}
    arguments = plain(state.get("_init_kwargs"), seen)
    return Module(str(found.value), arguments if isinstance(arguments, dict) else {}, dict(_named(found)))


def _array_of(state: Any) -> Tensor:
    """A numpy array from what it was told: version, shape, dtype, order and bytes."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("an array of it is not whole")
    _, shape, dtype, fortran, content = state
    array = np.frombuffer(content, dtype=_numpy(dtype)).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _named(module: Any, prefix: str = "", inside: tuple[int, ...] = ()) -> list[tuple[str, Tensor]]:
    """What ``state_dict`` would list of a module: its parameters, its persistent buffers, then those of its modules."""
    state = module.state if isinstance(module, Record) else None
    if not isinstance(state, dict) or id(module) in inside:
        raise ValueError(f"{prefix or 'a module'} of it is not whole")
    transient = state.get("_non_persistent_buffers_set") or ()
    found: list[tuple[str, Tensor]] = []
    for part in ("_parameters", "_buffers"):
        for name, held in _items(state, part, prefix):
            if held is None or (part == "_buffers" and name in transient):
                continue
            if not isinstance(held, Record) or held.kind != "tensor":
                raise ValueError(f"{prefix}{name} of it is no tensor")
            found.append((f"{prefix}{name}", held.value))
    for name, held in _items(state, "_modules", prefix):
        if held is not None:
            found += _named(held, f"{prefix}{name}.", (*inside, id(module)))
    return found


def _items(state: Any, part: str, prefix: str) -> list[tuple[Any, Any]]:
    held = state.get(part, {})
    if not isinstance(held, dict):
        raise ValueError(f"{prefix}{part} of it is not whole")
    return list(dict.items(held))
