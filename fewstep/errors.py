"""Errors a user can cause, each with the exit code the command line gives it.

Anything else that escapes is a defect of fewstep and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class FewstepError(Exception):
    """A failure that one sentence explains. Exit code 1."""

    exit_code = 1


class UsageError(FewstepError):
    """A wrong command line, config or path: nothing was started. Exit code 2."""

    exit_code = 2


class EnvironmentFault(FewstepError):
    """Something this machine lacks: a weights file, an accelerator, a package. Exit code 3."""

    exit_code = 3


class GateFailed(FewstepError):
    """A quality gate such as ``--max-fid`` was not met. Exit code 4."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """A ready-made clause naming the known word nearest to ``word``, or listing all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of this machine or of its GPU, is what ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "allocate memory", "storage size calculation overflowed")
