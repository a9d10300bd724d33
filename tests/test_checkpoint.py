"""Files on disk: written whole or not at all, and checked when read."""

import datetime
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import contents

from fewstep.checkpoint import (
    Checkpoint,
    RunDirectory,
    checkpoints,
    damage_in,
    read_checkpoint,
    read_model,
    read_tensors,
    restore_checkpoints,
    write_checkpoint,
    write_model,
    write_tensors,
)
from fewstep.errors import UsageError
from fewstep.files import (
    DiskError,
    check_folder,
    digest,
    disk_errors,
    is_temporary,
    overwrite_json,
    read_json,
    sync_folder,
    temporary_for,
    write_atomic,
)

TENSORS = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.tensor(3)}


def tensors_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusing(number: int) -> Callable[..., None]:
    """A call that the system refuses, without saying where, as it does when it writes."""

    def call(*arguments: object, dir_fd: int | None = None) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_write_that_fails_names_its_place_and_leaves_the_old_file_and_nothing_else(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refusing(number))
            with pytest.raises(DiskError) as caught:
                write_atomic(path, "new")
        assert str(caught.value) == f"{os.strerror(number)}: {path}"
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
        assert caught.value.exit_code == (2 if number == errno.EROFS else 1)
        assert isinstance(caught.value, OSError)
        assert contents(tmp_path) == {"deep/file.json": b"old"}


def test_a_write_that_is_interrupted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", "new")
    assert names(tmp_path) == []


def test_the_first_error_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that went bad refuses the cleaning up as well."""
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    monkeypatch.setattr(os, "unlink", refusing(errno.EROFS))
    with pytest.raises(DiskError, match=os.strerror(errno.EIO)):
        write_atomic(tmp_path / "file", "new")


def test_a_long_path_is_cut(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        write_atomic(tmp_path / ("x" * 300), "new")
    assert str(caught.value).startswith("File name too long: ")
    assert len(str(caught.value)) < 230
    with pytest.raises(DiskError, match=r"^out of cheese: somewhere$"), disk_errors(Path("somewhere")):
        raise OSError("out of cheese")


def is_open_as(descriptor: int) -> Callable[[Path], bool]:
    return lambda path: path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def test_names_reach_the_disk_after_contents_and_before_anybody_relies_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was flushed: file, then the folder that names it, and that folder in its own parents."""
    path = tmp_path / "new" / "deep" / "file"
    flushed = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        known = (tmp_path, tmp_path / "new", path.parent, temporary_for(path))
        flushed.append((*filter(is_open_as(descriptor), known), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomic(path, "x" * 100_000)
    folders = [(tmp_path, False), (tmp_path / "new", False)]
    assert flushed == [*folders, (temporary_for(path), False), (path.parent, True)]
    assert path.stat().st_size == 100_000


@pytest.mark.parametrize("function", ["fsync", "open"])
def test_a_disk_that_cannot_flush_a_folder(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EINVAL, errno.EACCES, errno.ENOTSUP):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refusing(number))
            sync_folder(tmp_path)
    monkeypatch.setattr(os, function, refusing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)


def test_names_of_temporary_files(tmp_path: Path) -> None:
    assert is_temporary(temporary_for(tmp_path / "status.json"))
    assert is_temporary(temporary_for(tmp_path / "step-00000001"))
    assert temporary_for(tmp_path / "a").parent == tmp_path
    for name in ("status.json", ".hidden", ".hidden.tmp", "a.12.tmp", ".a.b.tmp", ".a.12.tmp~", ".12.tmp"):
        assert not is_temporary(tmp_path / name)


def test_overwriting_in_place_stays_valid_within_the_room_there_is(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("x" * 150)
    path.chmod(0o600)
    before = path.stat()
    overwrite_json(path, {"state": "failed", "message": "short", "value": float("nan")}, shorten="message")
    assert path.stat().st_size == 150
    assert read_json(path) == {"state": "failed", "message": "short", "value": None}
    overwrite_json(path, {"state": "failed", "message": "é" * 10_000, "step": 3}, shorten="message")
    found = read_json(path)
    assert (found["state"], found["step"]) == ("failed", 3)
    assert found["message"] == "é" * len(found["message"])
    # Fills the room to the last character, six bytes each.
    assert path.stat().st_size + 6 > max(150, before.st_blocks * 512)
    after = path.stat()
    assert (after.st_blocks, after.st_ino) == (before.st_blocks, before.st_ino)
    path.write_text("{}")
    with pytest.raises(DiskError, match="No space left"):
        overwrite_json(path, {"state": "x" * 10_000, "message": ""}, shorten="message")
    assert read_json(path) == {}


@pytest.mark.parametrize("written", [None, 20, 200])
def test_overwriting_where_blocks_are_no_promise(
    written: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that compresses or copies on write may refuse to grow a file, at once or in the middle."""
    path = tmp_path / "status.json"
    path.write_text(" " * 150)

    class Disk:
        def __init__(self, file: object) -> None:
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> "Disk":
            return self

        def __exit__(self, *arguments: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            if len(content) <= path.stat().st_size:
                return self.file.write(content)
            if written is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content[:written])

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda *arguments, **named: Disk(opened(*arguments, **named)))
    overwrite_json(path, {"state": "failed", "message": "m" * 1000}, shorten="message")
    monkeypatch.undo()
    assert path.stat().st_size == max(150, written or 0)
    assert read_json(path)["state"] == "failed"
    assert len(read_json(path)["message"]) > 50


def test_tensors_round_trip_to_the_bit_under_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    sha = write_tensors(path, TENSORS)
    assert sha == digest(path.read_bytes())
    assert tensors_equal(read_tensors(path, sha), TENSORS)
    with pytest.raises(UsageError, match="damaged"):
        read_tensors(path, "0" * 64)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(TENSORS, path)
    with pytest.raises(UsageError, match="damaged"):
        read_tensors(path, digest(path.read_bytes()))


@pytest.mark.parametrize(("text", "says"), [("", "damaged"), ("[]", "not a JSON object"), ("[" * 100_000, "damaged")])
def test_json_that_is_no_object(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_json(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_json(tmp_path)
    with pytest.raises(UsageError, match="no "):
        read_json(tmp_path / "none.json")


# Checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoint(done: int = 1) -> Checkpoint:
    tensors = TENSORS | {"n": torch.tensor(done)}
    return Checkpoint({"student": tensors, "optimizer": TENSORS}, {"stage": 0, "done": done, "seconds": 0.125 * done})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_kept_in_order_and_pruned(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        write_checkpoint(tmp_path, step, checkpoint(step), keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000100"]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)
    read = read_checkpoint(checkpoints(tmp_path)[0])
    assert tensors_equal(read.groups["optimizer"], TENSORS)
    assert read.groups["student"]["n"] == 10
    assert (read.state["step"], read.state["done"], read.state["seconds"]) == (10, 10, 1.25)
    write_checkpoint(tmp_path, 200, checkpoint(), keep=None)
    assert len(names(tmp_path)) == 4


def test_only_folders_of_a_step_are_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-99999999", "step-100000000", "step-", "step-1.tmp", "step-x", "xstep-1", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step-00000010", "step-99999999", "step-100000000"]
    assert checkpoints(tmp_path / "none") == []


FAULTS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "full": (os, "fsync", refusing(errno.ENOSPC)),
    "no rename": (Path, "rename", refusing(errno.EIO)),
    "out of memory": (torch.Tensor, "contiguous", refusing(errno.ENOMEM)),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_that_fails_leaves_the_others_and_nothing_of_itself(
    step: int, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 1, checkpoint(), keep=1)
    before = contents(tmp_path)
    monkeypatch.setattr(*FAULTS[case])
    with pytest.raises(DiskError) as caught:
        write_checkpoint(tmp_path, step, checkpoint(7), keep=1)
    assert str(caught.value).endswith(f"{tmp_path}/step-0000000{step}")
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("fails", [1, 2])
def test_replacing_a_checkpoint_never_loses_it(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames replace a folder: whichever fails, in this process or with it, the old one is found again."""
    write_checkpoint(tmp_path, 1, checkpoint(), keep=2)
    before = contents(tmp_path)
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == fails:
            shutil.copytree(tmp_path, killed)
            raise KeyboardInterrupt
        return rename(self, target)

    killed = tmp_path.parent / f"killed-{fails}"
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 1, checkpoint(7), keep=2)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert len(names(killed)) == 2
    run = RunDirectory(tmp_path / "run")
    shutil.move(killed, run.checkpoints)
    run.prepare(resume=True, overwrite=False)
    assert contents(run.checkpoints) == before
    assert names(run.checkpoints) == ["step-00000001"]


def test_what_a_process_of_the_same_number_left_is_in_no_checkpoint(tmp_path: Path) -> None:
    """In a container every run is process 1."""
    target = tmp_path / "step-00000001"
    for leftover in (temporary_for(target), tmp_path / ".step-00000001.old"):
        leftover.mkdir()
        (leftover / "stray").write_text("")
        write_checkpoint(tmp_path, 1, checkpoint(), keep=1)
        assert names(tmp_path) == ["step-00000001"]
        assert names(target) == ["optimizer.safetensors", "state.json", "student.safetensors"]


def test_a_replaced_checkpoint_is_the_new_one(tmp_path: Path) -> None:
    for done in (1, 7):
        write_checkpoint(tmp_path, 1, checkpoint(done), keep=2)
    assert names(tmp_path) == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").state["done"] == 7
    # Killed before the old one was deleted: the new one counts.
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000001.old")
    (tmp_path / ".step-00000001.old" / "state.json").write_text("old")
    restore_checkpoints(tmp_path)
    assert names(tmp_path) == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").state["done"] == 7


def test_what_is_pruned_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 1, checkpoint(), keep=1)
    deleted = []
    rmtree = shutil.rmtree

    def watch(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            deleted.append(path.name)
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", watch)
    write_checkpoint(tmp_path, 2, checkpoint(), keep=1)
    write_checkpoint(tmp_path, 2, checkpoint(), keep=1)
    assert deleted == [f".step-00000001.{os.getpid()}.tmp", ".step-00000002.old"]


def test_a_checkpoint_is_on_disk_before_an_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, 1, checkpoint(), keep=1)
    fsync, flushed = os.fsync, []

    def watch(descriptor: int) -> None:
        if is_open_as(descriptor)(tmp_path):
            flushed.append(names(tmp_path))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_checkpoint(tmp_path, 2, checkpoint(), keep=1)
    assert flushed[-1] == ["step-00000001", "step-00000002"]


def test_what_a_killed_process_left_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_checkpoint(run.checkpoints, 1, checkpoint(), keep=2)
    before = contents(tmp_path)
    for folder in (run.checkpoints, run.averages):
        (folder / ".step-00000002.99999.tmp").mkdir(parents=True)
        (folder / ".step-00000002.99999.tmp" / "state.json").write_text("half")
        shutil.copytree(run.checkpoints / "step-00000001", folder / ".step-00000001.old")
    shutil.copytree(run.checkpoints / "step-00000001", run.averages / "step-00000001")
    for name in (".status.json.1.tmp", "model/.config.json.1.tmp", "stages/.steps-0004.safetensors.1.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / ".checkpoints.1.tmp").mkdir()
    (tmp_path / ".notes").write_text("mine")
    run.prepare(resume=True, overwrite=False)
    kept = {f"averages/{name.partition('/')[2]}": content for name, content in before.items()}
    assert contents(tmp_path) == before | kept | {".notes": b"mine"}
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".notes"]


def test_a_run_killed_before_its_status_was_written_is_none(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    temporary = tmp_path / ".status.json.99999.tmp"
    temporary.write_text("")
    run.prepare(resume=False, overwrite=False)
    assert names(tmp_path) == []


def test_overwriting_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes, a run has its status and no checkpoint: it can be overwritten, and not be resumed."""
    run = RunDirectory(tmp_path)
    run.write_status("done", step=2)
    for step in (1, 2):
        write_checkpoint(run.checkpoints, step, checkpoint(), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            run.prepare(resume=False, overwrite=True)
    assert checkpoints(run.checkpoints) == []
    with pytest.raises(UsageError, match=f"no checkpoint in {run.checkpoints}: start again with --overwrite"):
        run.check(resume=True, overwrite=False)
    run.prepare(resume=False, overwrite=True)
    assert names(tmp_path) == []


# Damage --------------------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    for step in (9, 10, 11, 12):
        write_checkpoint(tmp_path, step, checkpoint(), keep=4)
    twelve, eleven, ten, nine = (tmp_path / f"step-000000{step:02d}" for step in (12, 11, 10, 9))
    (twelve / "student.safetensors").unlink()
    with pytest.raises(UsageError) as caught:
        read_checkpoint(twelve)
    assert str(caught.value) == f"{twelve}/student.safetensors is missing; delete {twelve} to go on from step-00000011"
    damage(eleven / "state.json")
    with pytest.raises(UsageError, match=f"; delete {twelve} and {eleven} to go on from step-00000010$"):
        read_checkpoint(twelve)
    # A newer one is no way out.
    damage(nine / "optimizer.safetensors")
    with pytest.raises(UsageError, match=r"optimizer.safetensors is damaged.*; no older.*--overwrite$"):
        read_checkpoint(nine)
    damage(ten / "optimizer.safetensors")
    with pytest.raises(UsageError, match=r"student.safetensors is missing; no older.*start again with --overwrite$"):
        read_checkpoint(twelve)
    assert len(checkpoints(tmp_path)) == 4


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, 1, checkpoint(), keep=1)
    monkeypatch.setattr(Path, "read_bytes", refusing(errno.EACCES))
    with pytest.raises(UsageError, match=r"^cannot read \S+: Permission denied$"):
        read_checkpoint(path)
    monkeypatch.setattr(Path, "read_bytes", refusing(errno.EIO))
    with pytest.raises(UsageError, match="Input/output error; no older checkpoint"):
        read_checkpoint(path)


def test_every_bit_of_the_state_counts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 12, checkpoint(), keep=1)
    good = read_checkpoint(path).state
    file = path / "state.json"
    content = file.read_bytes()
    unnoticed = []
    for place in range(len(content)):
        for bit in (0, 2, 5):  # another digit, another letter, another case
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                assert read_checkpoint(path).state == good
            except UsageError:
                continue
            unnoticed.append(content[place : place + 1])
    assert set(unnoticed) <= {b" ", b"\n"}  # between the values, where any blank is as good
    for length in range(0, len(content) - 1, 5):  # the last character is a line's end
        file.write_bytes(content[:length])
        with pytest.raises(UsageError, match="damaged"):
            read_checkpoint(path)


# Models --------------------------------------------------------------------------------------------------------------


def test_a_model_counts_as_written_only_with_its_card(tmp_path: Path) -> None:
    keys = ("role", "student", "network", "two_times", "guidance", "teacher_digest")
    card = dict.fromkeys(keys, "x") | {"name": "m", "objective": "o"}
    card |= {"data": {"name": "d", "shape": [2], "num_classes": 0, "kind": "points"}}
    card |= {"train": {"steps": 1, "samples": 1, "seconds": 1.0}}
    write_model(tmp_path / "model", card, {"sampler": "jumps"}, {"model.safetensors": TENSORS}, "readme")
    model = read_model(tmp_path)
    assert tensors_equal(model.weights(), TENSORS)
    assert model.digest() == digest((tmp_path / "model" / "model.safetensors").read_bytes())
    assert read_model(tmp_path / "model").card == model.card
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UsageError, match="no run or model"):
        read_model(tmp_path)


def test_damage_is_what_building_from_a_file_raises_and_nothing_else(tmp_path: Path) -> None:
    for error in (KeyError("role"), TypeError("x"), RuntimeError("size mismatch\nfor w"), ValueError("x")):
        with pytest.raises(UsageError, match="damaged"), damage_in(tmp_path):
            raise error
    with pytest.raises(UsageError, match=r"^as it was$"), damage_in(tmp_path):
        raise UsageError("as it was")
    with pytest.raises(KeyboardInterrupt), damage_in(tmp_path):
        raise KeyboardInterrupt


# The run directory ---------------------------------------------------------------------------------------------------


def test_metrics_after_a_step_are_forgotten_with_a_line_cut_short(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.forget_metrics_after(3)
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step, "loss": 0.5})
    with run.metrics.open("ab") as file:
        file.write(b'\xff\x00\n{"step": 2, "lo\n[2]\n{"step": 5, "lo')
    run.forget_metrics_after(3)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


def test_a_status_says_who_wrote_it_and_when(tmp_path: Path) -> None:
    RunDirectory(tmp_path).write_status("running", step=3)
    status = read_json(tmp_path / "status.json")
    written = datetime.datetime.fromisoformat(status.pop("updated"))
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(minutes=1)
    assert status == {
        **{"state": "running", "step": 3, "message": "", "exit_code": None},
        **{"pid": os.getpid(), "host": socket.gethostname()},
    }


def test_a_status_on_a_full_disk_is_written_over_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    replace = os.replace
    monkeypatch.setattr(os, "replace", refusing(errno.ENOSPC))
    with pytest.raises(DiskError, match="No space left"):  # nothing to write over yet
        run.write_status("running", step=0)
    monkeypatch.setattr(os, "replace", replace)
    run.write_status("running", step=0)
    inode = (tmp_path / "status.json").stat().st_ino
    monkeypatch.setattr(os, "replace", refusing(errno.EDQUOT))
    run.write_status("failed", step=12, message="No space left on device: x", exit_code=1)
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 12, 1)
    assert status["message"] == "No space left on device: x"
    assert (tmp_path / "status.json").stat().st_ino == inode
    assert names(tmp_path) == ["status.json"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_reported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("running", step=0)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", refusing(number))
    for state in ("failed", "interrupted"):
        run.write_status(state, step=12, message="x", exit_code=1)
    for state in ("running", "done"):
        with pytest.raises(DiskError, match=os.strerror(number)):
            run.write_status(state, step=12)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    """/dev/full refuses as a disk does: while it is written to, and without a name."""
    run = RunDirectory(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(DiskError) as caught:
        run.append_metrics({"step": 1})
    assert str(caught.value) == f"No space left on device: {run.metrics}"


def test_a_run_behind_a_link_is_overwritten_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "disk")
    run = RunDirectory(link)
    run.write_status("done", step=1, exit_code=0)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (tmp_path / "disk" / "data").symlink_to(outside)
    run.prepare(resume=False, overwrite=True)
    assert link.is_symlink()
    assert list((tmp_path / "disk").iterdir()) == []
    assert (outside / "kept").read_text() == "x"


def test_a_folder_that_can_be_made(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_folder(Path("relative/and/new"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below", "dangling"):
        with pytest.raises(UsageError, match="not a folder"):
            check_folder(tmp_path / place)
