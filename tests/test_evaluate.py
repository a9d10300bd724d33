"""`fewstep evaluate` as a user meets it: guidance scales, averages, references in files, images of others, gates."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli, refuse, shell, student, succeed

from fewstep.config import read_config
from fewstep.workflows import sample_run

Copy = Callable[[str], Path]
PIXELS = ("--features", "pixels")
CLOCKS = ("latency_ms", "latency_p95_ms", "images_per_s", "batch")


def printed(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed("evaluate", *arguments, "--json").stdout)


def rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in document["rows"]]


@pytest.fixture(scope="module")
def guided(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student that takes guidance, with two averages."""
    run = tmp_path_factory.mktemp("guided") / "meanflow"
    own = ("train.steps=6", "train.lr=0.03", "train.warmup_steps=0", "train.ema=[0.1, 0.9]")
    more = ("student.guidance_input=true", "objective.guidance={scale: 1.0, largest: 4.0}")
    succeed("distill", "digits-meanflow", *student(trained / "teacher"), *own, *more, "--out", run)
    return run


def test_guidance_scales_are_rows_of_student_and_teacher(guided: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(guided, tmp_path / "run"))
    found = printed(run, *PIXELS, "--steps", 1, "--guidance", "1,2.5")
    kinds = [(row["role"], row["guidance"], row["steps"], row["nfe"]) for row in found["rows"]]
    assert kinds == [("teacher", 1.0, 4, 4), ("teacher", 2.5, 4, 8), ("student", 1.0, 1, 1), ("student", 2.5, 1, 1)]
    alone = printed(run, *PIXELS, "--steps", 1, "--guidance", "2.5", "--fresh")
    assert rows(alone) == [row for row in rows(found) if row["guidance"] == 2.5]  # compared with its own teacher
    assert len({row["metrics"]["teacher_gap"]["value"] for row in found["rows"][2:]}) == 2


def test_averages_are_rows(guided: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(guided, tmp_path / "run"))
    names = [average.name for average in read_config(run).train.ema]
    found = printed(run, *PIXELS, "--steps", 1, "--ema", "all")
    assert [row.get("ema") for row in found["rows"]] == [None, *names]
    assert len({row["digest"] for row in found["rows"]}) == 3
    exported = printed(run, *PIXELS, "--steps", 1)["rows"][1]
    assert exported["metrics"] == found["rows"][1]["metrics"]  # the first average is the one that is exported
    assert "ema" not in exported
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "checkpoints",
        "evaluation",
        "model",
        "stages",
    ]
    refuse("evaluate", run, "--ema", "0.5", says=("no average '0.5'",))


def test_a_second_call_adds_rows(copied: Copy) -> None:
    run = copied("meanflow")
    first = printed(run, *PIXELS, "--steps", 2)
    assert len(list((run / "evaluation").iterdir())) == 2
    both = printed(run, *PIXELS, "--steps", "1,2")
    assert both["rows"][0] == first["rows"][0]  # to the clock
    assert both["rows"][2] == first["rows"][1]
    again = printed(run, *PIXELS, "--steps", "1,2", "--fresh")
    assert rows(again) == rows(both)


def test_rows_have_intervals_differences_and_a_protocol(copied: Copy) -> None:
    found = printed(copied("meanflow"), *PIXELS, "--steps", 1, "--n", 200)
    teacher, row = found["rows"]
    fd, debiased = (row["metrics"][f"{kind}_pixels"] for kind in ("fd", "fd_debiased"))
    assert debiased["low"] < debiased["value"] < debiased["high"]
    assert (fd["low"], fd["high"]) == (debiased["low"], debiased["high"])
    assert fd["value"] > debiased["value"]
    apart = row["differences"]["fd_debiased_pixels"]
    theirs = teacher["metrics"]["fd_debiased_pixels"]
    assert apart["value"] == pytest.approx(debiased["value"] - theirs["value"])
    # Shared seeds: the two rows' errors are one another's, so their difference is known better than either.
    assert apart["high"] - apart["low"] < debiased["high"] - debiased["low"]
    assert "differences" not in teacher
    gap = row["metrics"]
    assert 0 < gap["teacher_gap_p50"]["value"] < gap["teacher_gap_p95"]["value"]
    protocol = found["reference"]["protocol"]
    assert protocol["n"] == 200
    assert len(protocol["reference_digest"]) == 64
    assert row["flops"] > 0
    assert row["latency_p95_ms"] >= row["latency_ms"]
    assert row["images_per_s"] > 0
    assert all(model["device"] and model["device_type"] for model in found["models"])  # on what both were trained


def test_statistics_in_a_file_take_the_place_of_the_data(copied: Copy, tmp_path: Path) -> None:
    run, file = copied("meanflow"), tmp_path / "digits.refstats.safetensors"
    succeed("data", "stats", "digits-teacher", *PIXELS, "--out", file)
    measured = printed(run, *PIXELS, "--steps", 1)
    read = printed(run, *PIXELS, "--steps", 1, "--reference", file, "--fresh")
    for row in measured["rows"]:
        assert row.pop("neighbours_png")  # a file has no images
    assert rows(read) == rows(measured)
    assert read["reference"] == measured["reference"]  # the same protocol: such rows do compare
    refuse("evaluate", run, "--features", "digits", "--reference", file, says=("pixels features", "has digits"))
    refuse("evaluate", run, *PIXELS, "--reference", tmp_path / "no.npz", says=("cannot read",))


def test_imported_statistics_are_marked(copied: Copy, tmp_path: Path) -> None:
    run, file = copied("meanflow"), tmp_path / "others.npz"
    succeed("data", "stats", "digits-teacher", *PIXELS, "--out", file)
    found = printed(run, *PIXELS, "--steps", 1, "--reference", file)
    assert found["reference"]["protocol"]["reference"] == "pixels: statistics of others.npz, imported"
    assert found["reference"]["n"] == 1797
    assert found["reference"]["floor"] == {}
    names = {name for row in found["rows"] for name in row["metrics"]}
    assert "fd_pixels" in names
    assert not names & {"kd_pixels", "recall_pixels"}
    ours = printed(run, *PIXELS, "--steps", 1)
    for a, b in zip(found["rows"], ours["rows"], strict=True):
        assert a["metrics"]["fd_pixels"]["value"] == pytest.approx(b["metrics"]["fd_pixels"]["value"], rel=1e-6)


# Images of others ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another project keeps of 100 samples of ours."""
    from fewstep.evaluation.quantise import to_uint8

    x = sample_run(trained / "meanflow", steps=2, n=100, seed=0, batch_size=100).x
    path = tmp_path_factory.mktemp("batch") / "samples.npz"
    np.savez(path, arr_0=to_uint8(x).permute(0, 2, 3, 1).numpy())
    return path


def test_a_batch_of_samples_has_the_numbers_of_the_run(batch: Path, trained: Path, tmp_path: Path) -> None:
    line = ("--images", batch, "--data", "digits-teacher", *PIXELS, "--steps", 2, "--nfe", 4, "--out", tmp_path / "out")
    found = printed(*line)
    (row,) = found["rows"]
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    run = Path(shutil.copytree(trained / "meanflow", tmp_path / "run"))
    measured = printed(run, *PIXELS, "--steps", 2, "--n", 100)
    theirs = measured["rows"][1]["metrics"]
    for name in ("fd", "kd", "precision", "recall", "density", "coverage"):
        value = row["metrics"][f"{name}_pixels"]["value"]
        assert value == pytest.approx(theirs[f"{name}_pixels"]["value"], rel=1e-5, abs=1e-6)
    assert (row["model"], row["role"], row["steps"], row["nfe"], row["n"]) == ("samples", "student", 2, 4, 100)
    assert row["latency_ms"] is None
    assert row["samples_png"]
    assert found["reference"] == measured["reference"]
    assert (
        json.loads(succeed("report", tmp_path / "out", run, "--out", tmp_path / "both", "--json").stdout)["rows"] == 3
    )
    assert cli("evaluate", *line, "--max", "fd_pixels=1e-3").exit_code == 4


def test_a_folder_of_images_is_a_batch(batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(np.load(batch)["arr_0"]):
        Image.fromarray(image[:, :, 0]).save(folder / f"{i:03}.png")
    found = printed("--images", "pictures", "--data", "digits-teacher", *PIXELS)
    same = printed("--images", batch, "--data", "digits-teacher", *PIXELS)
    assert found["rows"][0]["metrics"] == same["rows"][0]["metrics"]
    assert (found["rows"][0]["steps"], found["rows"][0]["nfe"]) == (0, 0)
    assert (tmp_path / "runs" / "pictures" / "results.json").is_file()
    succeed("report", tmp_path / "runs" / "pictures")  # also without a number of steps


def test_mistakes(batch: Path, trained: Path, tmp_path: Path) -> None:
    run = trained / "meanflow"
    other = tmp_path / "wide.npz"
    np.savez(other, arr_0=np.zeros((20, 16, 16, 1), dtype=np.uint8))
    images = ("evaluate", "--images", batch)
    refuse("evaluate", says=("a RUN, or --images",))
    refuse("evaluate", run, "--images", batch, says=("a RUN, or --images",))
    refuse(*images, says=("--data",))
    refuse(*images, "--data", "digits-teacher", "--ema", "all", says=("--ema",))
    refuse("evaluate", run, "--nfe", 3, says=("--nfe goes with --images",))
    refuse("evaluate", "--images", other, "--data", "digits-teacher", says=("1x16x16", "1x8x8"))
    refuse("evaluate", "--images", tmp_path / "no", "--data", "digits-teacher", says=("no ",))
    refuse("evaluate", run, "--max-fid", "3", says=("--max-fid is for inception features", "--max-fd"))
    refuse("evaluate", run, "--max", "fd_pixels", says=("METRIC=BOUND",))
    refuse("evaluate", run, "--guidance", "1,x", says=("--guidance takes numbers",))
    refuse("evaluate", run, "--guidance", "1,2", says=("does not take guidance",))
    assert not (run / "evaluation").exists()


def test_gates_name_metric_and_steps(copied: Copy) -> None:
    measure = ("evaluate", copied("meanflow"), *PIXELS, "--steps", "1,2")
    assert cli(*measure, "--max", "fd_pixels=1e9", "--min", "recall_pixels=0@1").exit_code == 0
    failed = cli(*measure, "--max", "kd_pixels=-1@2")
    assert failed.exit_code == 4
    assert "kd_pixels at 2 steps is" in failed.stderr
    unknown = cli(*measure, "--max", "fd_pixel=1")
    assert unknown.exit_code == 2
    assert "did you mean 'fd_pixels'" in unknown.stderr


def test_gates_against_the_teacher(copied: Copy, batch: Path) -> None:
    """The teacher's own row is not held to them; where none will be measured, nothing is."""
    run = copied("meanflow")
    measure = ("evaluate", run, *PIXELS, "--steps", "1,2")
    lax = ("--max", "fd_pixels=1e6*teacher@2", "--min", "recall_pixels=teacher-1", "--max", "latency_ms=1e6*teacher")
    assert cli(*measure, *lax).exit_code == 0
    failed = cli(*measure, "--max", "fd_pixels=1e-6*teacher@2")
    assert failed.exit_code == 4
    assert "= 1e-06 × teacher at 4 steps (" in failed.stderr
    asked = ("--max", "fd_pixels=teacher")
    refuse("evaluate", copied("teacher"), *asked, says=("fd_pixels is to be held against the teacher", "itself"))
    refuse("evaluate", "--images", batch, "--data", "digits-teacher", *asked, says=("measured without one",))
    config = run / "config.yaml"
    config.write_text(re.sub(r"teacher_steps:(\n +- \d+)+", "teacher_steps: []", config.read_text()))
    shutil.rmtree(run / "evaluation")
    refuse("evaluate", run, *asked, says=("evaluate.teacher_steps is empty",))
    assert not (run / "evaluation").exists()  # all of this before any work


@pytest.mark.slow
def test_processes_write_what_one_writes(copied: Copy, tmp_path: Path) -> None:
    run = copied("meanflow")
    alone = printed(run, *PIXELS, "--steps", "1,2", "--batch-size", 64)
    shutil.rmtree(run / "evaluation")
    line = ("evaluate", run, *PIXELS, "--steps", "1,2", "--batch-size", 64, "--processes", 2)
    ended = shell(*line, "--max", "fd_pixels=1e-3", "--json", cwd=tmp_path)
    assert ended.returncode == 4, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: fd_pixels at 1 steps is ")
    found = json.loads(ended.stdout)
    assert rows(found) == rows(alone)
    assert found == json.loads((run / "results.json").read_text())
    assert found["environment"]["processes"] == 2
