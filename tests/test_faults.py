"""A run survives anything: full and read-only disks, damaged files, signals, and being killed at every point.

As a user meets it: one sentence, an exit code, and a way to go on that ends with the bits of an undisturbed run.
"""

import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import SMALL, cli, contents, refuse, student, succeed
from ends import assert_same_end, leftovers, status

from fewstep.checkpoint import checkpoints, read_checkpoint

STEPS, TOTAL = ("train.steps=12", "train.checkpoint_every=2", "train.keep_checkpoints=100"), 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(trained: Path) -> tuple[str, ...]:
    """The command that most of these tests disturb."""
    return ("distill", "digits-meanflow", *student(trained / "teacher"), *STEPS)


@pytest.fixture(scope="module")
def undisturbed(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(*command, "--out", run)
    return run


def fail(*arguments: object, says: tuple[str, ...], code: int) -> str:
    """``fewstep ARGUMENTS`` that starts and then has to end with one sentence, which is given back."""
    result = cli(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "/12  " not in line]  # the meter's
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in says:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    return lines[0]


def after_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], bool | None]) -> None:
    """Call ``act(n)`` after the ``n``-th step of a command; what is true asks the command to stop."""
    import fewstep.interrupts

    @contextmanager
    def asked() -> Iterator[Callable[[], bool]]:
        count = iter(range(1, 10**9))
        yield lambda: bool(act(next(count)))

    monkeypatch.setattr(fewstep.interrupts, "stop_requested", asked)


# Full and read-only disks --------------------------------------------------------------------------------------------

Remount = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Remount]]:
    """A small disk of its own, and a way to mount it anew with other options."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> None:
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            subprocess.run(line, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a disk here: {getattr(error, 'stderr', error)}")

    mount("size=8m")
    yield path, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_disk_that_fills_up(
    disk: tuple[Path, Remount], command: tuple[str, ...], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = disk[0] / "run", []
    disk[1](f"size={sum(path.stat().st_blocks * 512 for path in undisturbed.rglob('*')) // 2}")
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda step: seen.append(contents(run / "checkpoints")))
        fail(*command, "--out", run, says=("No space left on device", str(run)), code=1)
    # What lay there before the last step, byte for byte.
    assert seen[-1]
    assert seen[-1].items() <= contents(run / "checkpoints").items()
    for path in checkpoints(run / "checkpoints"):
        read_checkpoint(path)
    assert leftovers(run) == []
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 1)
    assert "No space left on device" in status(run)["message"]
    assert (status(run)["pid"], status(run)["host"]) == (os.getpid(), socket.gethostname())
    # Still full.
    before = contents(run / "checkpoints")
    fail(*command, "--out", run, "--resume", says=("No space left on device", str(run)), code=1)
    assert contents(run / "checkpoints") == before
    disk[1]("size=8m")
    succeed(*command, "--out", run, "--resume")
    assert_same_end(run, undisturbed, TOTAL)


def test_a_disk_without_a_single_free_block(
    disk: tuple[Path, Remount], command: tuple[str, ...], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even the status, of which the disk has no second copy to give room for, says that the run has failed."""
    run, ballast = disk[0] / "run", disk[0] / "ballast"

    def fill(step: int) -> None:
        if step == 3:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with monkeypatch.context() as patch:
        after_each_step(patch, fill)
        fail(*command, "--out", run, says=("No space left on device", str(run / "checkpoints" / "step-")), code=1)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002"]
    assert (status(run)["state"], status(run)["exit_code"]) == ("failed", 1)
    ballast.unlink()
    succeed(*command, "--out", run, "--resume")
    assert_same_end(run, undisturbed, TOTAL)


def test_a_disk_that_becomes_read_only(
    disk: tuple[Path, Remount], command: tuple[str, ...], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, remount = disk[0] / "run", disk[1]
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda step: remount("ro") if step == 5 else None)
        fail(*command, "--out", run, says=("Read-only file system", str(run)), code=2)
    before = contents(run)
    refuse(*command, "--out", run, "--resume", says=("cannot write", str(run)))
    refuse(*command, "--out", run, "--overwrite", says=("cannot write", str(run)))
    refuse(*command, "--out", disk[0] / "new", says=("cannot write", str(disk[0])))
    assert contents(disk[0]) == {f"run/{name}": content for name, content in before.items()}
    remount("rw")
    succeed(*command, "--out", run, "--resume")
    assert_same_end(run, undisturbed, TOTAL)


def file_writes(run: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> Callable[[], int]:
    """From the write after the ``allowed``-th on, refuse to make or lengthen a file below ``run``; counts the asked."""
    opened, count = Path.open, 0

    def opening(self: Path, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: None = None):
        nonlocal count
        if self.is_relative_to(run) and mode in ("a", "wb"):
            count += 1
            if count > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, buffering, encoding, errors)

    monkeypatch.setattr(Path, "open", opening)
    return lambda: count


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_disk_that_is_full_from_any_write_on(
    every: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a disk of its own: the system call says so. A short run, at each of its writes."""
    overrides = ("train.steps=4", "train.checkpoint_every=2", "train.keep_checkpoints=1")
    command = ("distill", "digits-meanflow", *student(trained / "teacher"), *overrides)
    with monkeypatch.context() as patch:
        writes = file_writes(tmp_path / "whole", patch, 10**9)
        succeed(*command, "--out", tmp_path / "whole")
    assert writes() > 20
    for allowed in range(0, writes() - 1, every):
        run = tmp_path / f"run-{allowed}"
        with monkeypatch.context() as patch:
            file_writes(run, patch, allowed)
            result = cli(*command, "--out", run)
        *meter, said = result.stderr.splitlines()
        assert result.exit_code == 1
        assert said.startswith(f"error: No space left on device: {run}/"), said
        assert all("/4  " in line for line in meter)
        assert leftovers(run) == []
        if allowed:
            assert status(run)["state"] in ("failed", "running")
        for path in checkpoints(run / "checkpoints"):
            read_checkpoint(path)
        resumes = bool(checkpoints(run / "checkpoints"))
        succeed(*command, "--out", run, *(["--resume"] if resumes else ["--overwrite"] if allowed else []))
        assert_same_end(run, tmp_path / "whole", 4)
    # The last write is a status, which goes over the one that is there.
    run = tmp_path / "all but one"
    file_writes(run, monkeypatch, writes() - 1)
    succeed(*command, "--out", run)
    assert_same_end(run, tmp_path / "whole", 4)


def test_standard_output_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewstep.cli

    def full(document: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fewstep.cli, "emit_json", full)
    says = ("No space left on device: standard output",)
    refuse("teach", "digits-teacher", "--dry-run", "--json", says=says, code=1)


# Damage --------------------------------------------------------------------------------------------------------------


def flip(place: float) -> Callable[[Path], None]:
    """Flip one bit, at that part of the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return damage


def truncate(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit flipped at {place}": flip(place) for place in (0, 0.003, 0.3, 0.6, 1)},
    **{f"truncated to {share}": truncate(share) for share in (0, 0.5, 0.99)},
    "removed": Path.unlink,
}
PARTS = ("student", "ema-0.999", "optimizer", "state")


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4, ... 10 and no end yet."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "my run"))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    return run


@pytest.mark.parametrize("part", PARTS)
def test_any_damage_to_a_checkpoint_is_one_sentence_with_a_way_to_go_on(
    part: str, stopped: Path, command: tuple[str, ...], undisturbed: Path
) -> None:
    newest = stopped / "checkpoints" / "step-00000010"
    file = next(newest.glob(f"{part}.*"))
    whole = file.read_bytes()
    for name, damage in DAMAGES.items():
        file.write_bytes(whole)
        damage(file)
        before = contents(stopped)
        said = refuse(
            *(*command, "--out", stopped, "--resume"),
            says=(str(file), "missing" if name == "removed" else "damaged", "to go on from step-00000008"),
        )
        assert contents(stopped) == before, name
        assert said.count(str(newest)) == 2
    follow(said)
    succeed(*command, "--out", stopped, "--resume")
    assert_same_end(stopped, undisturbed, TOTAL)


def follow(said: str) -> None:
    """Do what a sentence says is to be deleted."""
    for path in said.partition("; delete ")[2].partition(" to go on from ")[0].split(" and "):
        shutil.rmtree(path)


def test_several_damaged_checkpoints(stopped: Path, command: tuple[str, ...], undisturbed: Path) -> None:
    resume = (*command, "--out", stopped, "--resume")
    for step in (10, 8, 4):
        flip(0.5)(stopped / "checkpoints" / f"step-{step:08d}" / "student.safetensors")
    follow(refuse(*resume, says=("to go on from step-00000006",)))
    assert [path.name for path in checkpoints(stopped / "checkpoints")] == [f"step-{step:08d}" for step in (2, 4, 6)]
    for step in (6, 2):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:08d}")
    refuse(*resume, says=("step-00000004", "damaged", "start again with --overwrite"))
    succeed(*command, "--out", stopped, "--overwrite")
    assert_same_end(stopped, undisturbed, TOTAL)


def test_a_checkpoint_folder_without_anything_in_it(stopped: Path, command: tuple[str, ...], undisturbed: Path) -> None:
    (stopped / "checkpoints" / "step-00000011").mkdir()
    (stopped / "checkpoints" / "step-00000099 (copy)").mkdir()
    follow(refuse(*command, "--out", stopped, "--resume", says=("step-00000011/state.json", "from step-00000010")))
    succeed(*command, "--out", stopped, "--resume")
    assert_same_end(stopped, undisturbed, TOTAL)


def test_resuming_with_something_else_than_the_run_began_with(
    stopped: Path, command: tuple[str, ...], trained: Path, tmp_path: Path, undisturbed: Path
) -> None:
    before = contents(stopped)
    resume = ("--out", stopped, "--resume")
    other = tmp_path / "teacher"
    succeed("teach", "digits-teacher", *SMALL, "train.steps=3", "--out", other)
    refuse(*command, f"teacher.path={other}", *resume, says=("teacher.path was", "--overwrite"))
    refuse(*command, "train.lr=0.5", *resume, says=("train.lr was", "--overwrite"))
    refuse(*command, f"teacher.path={tmp_path / 'none'}", *resume, says=(str(tmp_path / "none"), "fewstep teach"))
    teacher, aside = trained / "teacher", trained / "aside"
    teacher.rename(aside)
    try:
        refuse(*command, *resume, says=(str(teacher), "fewstep teach"))
        shutil.copytree(other, teacher)
        refuse(*command, *resume, says=("teacher", "weights have changed"))
    finally:
        shutil.rmtree(teacher, ignore_errors=True)
        aside.rename(teacher)
    assert contents(stopped) == before
    succeed(*command, *resume)
    assert_same_end(stopped, undisturbed, TOTAL)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_the_warning_before_a_time_limit(
    command: tuple[str, ...], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends SIGUSR1 ahead of the end: the run saves, stops, and says how to go on."""
    import fewstep.console

    def warned(meter: fewstep.console.Meter, done: int, total: int, detail: str) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: pytest.fail("nobody took the signal"))
    run = tmp_path / "run"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fewstep.console.Meter, "update", warned)
            said = fail(*command, "--out", run, says=("stopped at step 6 of 12; go on with --resume",), code=130)
        assert signal.getsignal(signal.SIGUSR1) is not before
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (status(run)["state"], status(run)["step"], status(run)["exit_code"]) == ("interrupted", 6, 130)
    succeed(*shlex.split(said.partition(": fewstep ")[2]))
    assert_same_end(run, undisturbed, TOTAL)
