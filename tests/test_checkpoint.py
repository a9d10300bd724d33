"""Files on disk: written whole or not at all, and checked when read."""

import json
import os
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
    write_checkpoint,
    write_model,
    write_tensors,
)
from fewstep.errors import UsageError
from fewstep.files import check_folder, digest, read_json, write_atomic

TENSORS = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.tensor(3)}


def tensors_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert contents(tmp_path) == {"deep/file.json": b"old"}


def test_the_final_name_appears_only_with_the_whole_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    seen = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(path.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomic(path, "x" * 100_000)
    assert seen == [False]
    assert path.stat().st_size == 100_000


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


def test_checkpoints_are_kept_in_order_and_pruned(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        write_checkpoint(tmp_path, step, Checkpoint({"student": TENSORS}, {"stage": 0, "done": step}), keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000020", "step-00000100"]
    read = read_checkpoint(checkpoints(tmp_path)[0])
    assert tensors_equal(read.groups["student"], TENSORS)
    assert (read.state["step"], read.state["done"]) == (10, 10)


def test_a_checkpoint_that_was_not_finished_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    state = {"stage": 0, "done": 1}
    write_checkpoint(tmp_path, 1, Checkpoint({"student": TENSORS}, state), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 2, Checkpoint({"student": TENSORS}, state), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]


def test_what_a_killed_process_left_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_checkpoint(run.checkpoints, 1, Checkpoint({"student": TENSORS}, {"stage": 0, "done": 1}), keep=2)
    leftover = run.checkpoints / ".step-00000002.99999.tmp"
    leftover.mkdir()
    run.prepare(resume=True, overwrite=False)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000001"]


def test_a_model_counts_as_written_only_with_its_card(tmp_path: Path) -> None:
    keys = ("role", "student", "network", "two_times", "guidance", "teacher_digest")
    card = dict.fromkeys(keys, "x") | {"name": "m", "objective": "o"}
    card |= {"data": {"name": "d", "shape": [2], "num_classes": 0}}
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


def test_metrics_after_a_step_are_forgotten_with_a_line_cut_short(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.forget_metrics_after(3)
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step, "loss": 0.5})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    run.forget_metrics_after(3)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


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
