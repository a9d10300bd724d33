"""Pickles as NVlabs' projects write them, made without their code: a module's class, its source and its state, to be
put together by ``torch_utils.persistence._reconstruct_persistent_obj``."""

import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a persistent object was reconstructed")


class EasyDict(dict[str, Any]):
    """A dictionary of theirs."""


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


@contextmanager
def their_modules() -> Iterator[None]:
    """The modules that the pickles name, for as long as they are written."""
    held = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, members in held.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        yield
    finally:
        for name in held:
            del sys.modules[name]


class Persistent:
    """What is pickled in the place of an object: its state with the arguments that made it."""

    def __init__(self, class_name: str, state: Mapping[str, Any], arguments: Mapping[str, Any], source: str) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": {**state, "_init_args": (), "_init_kwargs": dict(arguments)},
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,), None


def persistent(module: nn.Module, arguments: Mapping[str, Any], source: str, class_name: str | None = None) -> Any:
    """A module with everything in it, as their decorated classes are; containers of torch's are pickled as they are."""
    children = {name: persistent(child, {}, source) for name, child in module.named_children()}
    ours = ("fewstep.", "torch.nn.modules")  # their classes have other parts, and no configs
    state = {name: value for name, value in vars(module).items() if not type(value).__module__.startswith(ours)}
    if type(module).__module__.startswith("torch.nn.modules.container"):
        twin = type(module)()
        vars(twin)["_modules"] = children
        return twin
    # A place without a module, such as a block without a shortcut, is kept as None.
    state["_modules"] = {name: children.get(name) for name in vars(module)["_modules"]}
    return Persistent(class_name or type(module).__name__, state, arguments, source)


def write_snapshot(path: Path, *, source: str = "raise SystemExit", **held: Any) -> Path:
    """A network snapshot: ``held`` by name, pickled with the modules of the projects in sight."""
    with their_modules():
        path.write_bytes(pickle.dumps(EasyDict(held, dataset_kwargs=EasyDict(path="data.zip"))))
    return path
