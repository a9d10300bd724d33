"""Settings of the whole suite, and what the tests of the command line share: small trained runs, a way to call it."""

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

# The tensors are small: a second thread costs more than it gives, several times more on a busy machine.
torch.set_num_threads(1)

# Files outlive a killed process without it; what a power cut leaves cannot be tested, and every flush waits for a disk.
os.fsync = lambda descriptor: None

SMALL = ("train.batch_size=16", "train.log_every=1", "student.network={kind: mlp, width: 16, depth: 1}")
"""Overrides that make any recipe small."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: what begins last, a core does alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path]))


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """Take what is imported out of the garbage collector's rounds: accelerate asks for a full one after every training,
    which over the objects of all packages takes longer than a small training."""
    gc.collect()
    gc.freeze()


def cli(*arguments: object) -> Result:
    """``fewstep ARGUMENTS`` in this process. What it raises, other than its exit, fails the test."""
    from fewstep.cli import app

    result = CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> Result:
    """``fewstep ARGUMENTS`` that has to end well."""
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refuse(*arguments: object, says: tuple[str, ...], code: int = 2) -> str:
    """``fewstep ARGUMENTS`` that has to be refused in one line on stderr with every text of ``says``."""
    result = cli(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in says:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    return lines[0]


def shell(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``fewstep ARGUMENTS`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fewstep.cli", *map(str, arguments)],
        cwd=cwd,
        env=process_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def process_environment(**changes: str) -> dict[str, str]:
    """One thread, as in this process, so that bits can be compared; nothing of the terminal the tests run in."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")
    }
    return {**inherited, "OMP_NUM_THREADS": "1", "TERM": "dumb", **changes}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small finished runs: ``teacher``, ``meanflow``, ``progressive`` (8 -> 1 steps), ``consistency``.

    Shared by the whole session: a test that changes something works on a copy.
    """
    folder = tmp_path_factory.mktemp("runs")
    teacher = folder / "teacher"
    succeed("teach", "digits-teacher", *SMALL, "train.steps=20", "--out", teacher)
    own: dict[str, tuple[str, ...]] = {
        "meanflow": (),
        "progressive": ("objective.start_steps=8", "objective.last_stages_factor=2"),
        "consistency": (),
    }
    for name, overrides in own.items():
        recipe = f"digits-{name}"
        succeed("distill", recipe, *student(teacher), "train.steps=6", *overrides, "--out", folder / name)
    return folder


EVALUATE = ("evaluate.n=100", "evaluate.steps=[1, 2, 4, 8]", "evaluate.teacher_steps=[4]")


def student(teacher: Path) -> tuple[str, ...]:
    """Overrides that make a student of a small teacher."""
    return (*SMALL[:2], f"teacher.path={teacher}", *EVALUATE)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the small finished runs, to be damaged or overwritten."""
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(trained / name, tmp_path / name))

    return copy
