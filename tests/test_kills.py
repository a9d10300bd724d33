"""A run that is killed, at any point, goes on to the bits of an undisturbed one."""

import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import student, succeed
from ends import assert_same_end, status

from fewstep.checkpoint import checkpoints, read_checkpoint
from fewstep.files import is_temporary

OPERATIONS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
"""Every change that others see goes through one of these; a file still being written has no name that counts."""


def in_a_fork(arguments: tuple[object, ...], operations: int) -> int:
    """``fewstep ARGUMENTS`` in a child that is killed before its ``operations + 1``-th operation on files.

    Gives the number of its operations if it ended by itself, else -1.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., Any], *given: Any, **named: Any) -> Any:
            nonlocal count
            if count == operations:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*given, **named)

        for name in OPERATIONS:
            setattr(os, name, functools.partial(counted, getattr(os, name)))
        try:
            succeed(*arguments)
            os.write(writing, str(count).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    _, ended = os.waitpid(child, 0)
    if os.WIFSIGNALED(ended):
        return -1
    assert said, "the command failed before it was killed"
    return int(said)


def way_on(run: Path) -> list[str]:
    """As a user goes on: from a checkpoint, else from the beginning."""
    if any((run / "checkpoints").glob("step-*")) or any((run / "checkpoints").glob(".step-*.old")):
        return ["--resume"]
    return ["--overwrite"] if (run / "status.json").exists() else []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.thorough
@pytest.mark.parametrize("first", range(9))
def test_killed_between_any_two_operations_on_files(first: int, trained: Path, tmp_path: Path) -> None:
    """Killed once in the beginning, and once more somewhere in the resumed run."""
    overrides = ("train.steps=1", "objective.start_steps=4", "objective.last_stages_factor=2")
    few = ("train.checkpoint_every=2", "train.keep_checkpoints=1")
    command = ("distill", "digits-progressive", *student(trained / "teacher"), *overrides, *few)
    whole = tmp_path / "whole"
    total = in_a_fork((*command, "--out", whole), 10**9)
    assert total > 80
    rng = random.Random(first)
    for operations in range(first, total, 9):  # of all nine tests: every one
        run = tmp_path / f"run-{operations}"
        assert in_a_fork((*command, "--out", run), operations) == -1
        assert_sound(run)
        in_a_fork((*command, "--out", run, *way_on(run)), rng.randrange(total))
        assert_sound(run)
        succeed(*command, "--out", run, *way_on(run))
        assert_same_end(run, whole, status(whole)["step"])
        shutil.rmtree(run)


def assert_sound(run: Path) -> None:
    """Whatever has a name that counts is whole."""
    for path in checkpoints(run / "checkpoints"):
        read_checkpoint(path)
    for path in run.rglob("*.json"):
        if not any(is_temporary(part) for part in (path, *path.parents)):
            json.loads(path.read_text())


def kill_script() -> ModuleType:
    """``benchmarks/kill.py``, which kills processes as this test does, and oftener."""
    path = Path(__file__).parent.parent / "benchmarks" / "kill.py"
    spec = importlib.util.spec_from_file_location("kill", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("method", "moments"),
    [
        ("progressive", ("training", "checkpoint")),
        # A random moment after the start mostly is an import.
        *(
            pytest.param(name, ("training", "checkpoint", "start"), marks=pytest.mark.thorough)
            for name in ("progressive", "meanflow", "consistency")
        ),
    ],
)
def test_killed_processes_end_with_the_same_model(
    method: str, moments: tuple[str, ...], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = kill_script()
    if "start" not in moments:  # else the time that a whole process takes says when to kill
        monkeypatch.setattr(kill, "finish", succeed)
    command = kill.student(method, trained / "teacher", 300)
    outcome = kill.survive(command, tmp_path, moments, random.Random(method))
    assert len(outcome.kills) == len(moments)
    assert outcome.kills[1].inside
    assert outcome.identical
