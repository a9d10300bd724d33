"""Processes of their own without the seconds that each takes to import torch: forked from one that has imported it.

The server imports once for all tests of a worker and does nothing else, so that what it forks begins as a fresh
interpreter does, but for the modules. Tests of a start, of what it imports and of launchers need a fresh one
(``conftest.shell``).
"""

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import reduction
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
# The optimisers of torch import the last by themselves.
SERVER.set_forkserver_preload(["fewstep.cli", "fewstep.workflows", "torch._dynamo"])


class Descriptor:
    """An open file, on its way to another process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


class Forked:
    """``target(*arguments)`` in a process of its own, with what the tests use of ``subprocess.Popen``.

    ``stderr`` is a descriptor, of a terminal; without it the process writes to a file that ``communicate`` reads.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: object,
        environment: dict[str, str],
        cwd: Path | None = None,
        stderr: int | None = None,
    ) -> None:
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        outputs = [self._files[0].fileno(), self._files[1].fileno() if stderr is None else stderr]
        self._process = SERVER.Process(
            target=_child,
            args=(target, arguments, environment, str(cwd or Path.cwd()), [Descriptor(number) for number in outputs]),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it has written to stdout and stderr, once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"a process has not ended within {timeout} s")
        for file in self._files:
            file.seek(0)
        out, err = (file.read() for file in self._files)
        return out, err


def _child(
    target: Callable[..., object],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    cwd: str,
    outputs: list[Descriptor],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output.number, number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), "utf-8", line_buffering=True)
        for number in (1, 2)
    )
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    target(*arguments)


def fewstep(*arguments: str) -> None:
    """What the entry point does."""
    from fewstep.cli import main

    sys.argv = ["fewstep", *arguments]
    main()


def started(*arguments: object, cwd: Path | None = None, stderr: int | None = None, **environment: str) -> Forked:
    """``fewstep ARGUMENTS`` as a process of its own."""
    from conftest import process_environment

    words = [str(argument) for argument in arguments]
    return Forked(fewstep, *words, environment=process_environment(**environment), cwd=cwd, stderr=stderr)


def finished(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same once it has ended, as ``conftest.shell`` gives it."""
    process = started(*arguments, cwd=cwd, **environment)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)


def together(world: int, target: Callable[..., object], *arguments: object, cwd: Path | None = None) -> list[str]:
    """``target(*arguments)`` in as many processes as torchrun would start, with what it would tell each of them; what
    each has written to stdout. All have to end well."""
    from conftest import process_environment
    from torch.distributed import TCPStore

    # As torchrun's agent: the store is here, and its port cannot be anybody else's.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    meeting |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = [
        Forked(
            target,
            *arguments,
            environment=process_environment(RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="", **meeting),
            cwd=cwd,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [out for out, _ in said]
