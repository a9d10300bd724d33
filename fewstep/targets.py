"""Somebody else's Python, found by its address ``package.module:name``."""

import contextlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from fewstep.errors import UsageError


def load_target(target: str, field: str, wanted: str) -> Any:
    """What lies at ``package.module:name``, which has to be callable; the working directory is looked in too. A class
    is called without arguments.

    ``field`` is where the user named it and ``wanted`` what it has to be, for the ``UsageError`` that says it is not
    there or is something else.
    """
    name, _, path = target.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
        made = found() if inspect.isclass(found) else found
    except Exception as error:  # somebody else's code fails as it likes
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"{field}{target}: {type(error).__name__}: {said}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(made):
        raise UsageError(f"{field}{target} is a {type(made).__name__}: it has to be a function {wanted}")
    return made


def source_of(made: object) -> bytes:
    """The source file of what was found; empty where it has none."""
    with contextlib.suppress(OSError, TypeError):  # built in, or typed in
        return inspect.getsource(inspect.getmodule(made) or type(made)).encode()
    return b""
