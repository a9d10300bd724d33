"""The commands as a user types them: what they print where, what they write, and their exit codes."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, cli, contents, process_environment, refuse, succeed
from forked import Forked, started
from safetensors.torch import load_file

from fewstep.config import comparison_names, recipe_names
from fewstep.evaluation.bank import Finished
from fewstep.evaluation.quantise import to_uint8
from fewstep.evaluation.results import SCHEMA, Measured
from fewstep.flow import uniform_grid
from fewstep.keys import Key
from fewstep.sampling import sample_ode
from fewstep.students.load import load_model

Copy = Callable[[str], Path]


# A light start -------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numpy", "matplotlib", "accelerate", "safetensors", "PIL", "jinja2", "torchvision", "scipy")
PROBE = """
import sys
sys.argv = ["fewstep", *sys.argv[1:]]
try:
    from fewstep.cli import main
    main()
except SystemExit as end:
    code = end.code
print("\\nloaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
print("exit:", code or 0)
"""


def loaded(code: str, *arguments: str) -> tuple[set[str], str]:
    """Names of the packages that a fresh interpreter has loaded at the end, and the last line it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *_, modules, last = done.stdout.strip().splitlines()
    return set(modules.removeprefix("loaded: ").split()), last


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (("--help",), "exit: 0"),
        (("distill", "--help"), "exit: 0"),
        (("--version",), "exit: 0"),
        (("recipes", "list"), "exit: 0"),
        (("distill", "digits-meanflow", "--dry-run"), "exit: 0"),
        (("distill", "digits-meanflow", "train.stesp=3"), "exit: 2"),
        (("evaluate", "nowhere", "--steps", "x"), "exit: 2"),
    ],
)
def test_help_and_config_errors_load_nothing_heavy(arguments: tuple[str, ...], end: str) -> None:
    modules, last = loaded(PROBE, *arguments)
    assert last == end
    assert "fewstep" in modules
    assert not modules & set(HEAVY)
    if "--help" in arguments:
        assert "yaml" not in modules  # typer itself may load pydantic for a command's options


def test_importing_the_package_loads_nothing() -> None:
    modules, _ = loaded(
        "import sys, fewstep\nprint('loaded:', *{n.partition('.')[0] for n in sys.modules})\nprint('end')"
    )
    assert "fewstep" in modules
    assert not modules & {*HEAVY, "typer", "rich", "pydantic", "yaml"}


def test_the_version() -> None:
    import fewstep

    assert succeed("--version").stdout == f"{fewstep.__version__}\n"


def test_every_command_of_the_design_that_exists_explains_itself() -> None:
    listed = succeed("--help").stdout
    for command in (
        "demo",
        "compare",
        "recipes",
        "teach",
        "distill",
        "sample",
        "average",
        "evaluate",
        "report",
        "bench",
        "doctor",
    ):
        assert command in listed
        assert "Usage:" in succeed(command, "--help").stdout
    for command in ("teach", "distill"):
        text = succeed(command, "--help").stdout
        for option in ("--out", "--resume", "--overwrite", "--seed", "--processes", "--dry-run", "--json"):
            assert option in text


# --json --------------------------------------------------------------------------------------------------------------


def document(*arguments: object) -> dict[str, Any]:
    """The one JSON document on stdout; ``json.loads`` refuses anything beside it."""
    result = succeed(*arguments, "--json")
    assert result.stdout.startswith("{\n")
    parsed = json.loads(result.stdout)
    assert isinstance(parsed, dict)
    return parsed


def test_json_of_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = succeed("teach", "digits-teacher", *SMALL, "train.steps=2", "--out", run, "--json")
    printed = json.loads(result.stdout)
    assert printed["run"] == str(run)
    assert printed["model"] == json.loads((run / "model" / "config.json").read_text())
    assert "2/2" in result.stderr
    assert str(run) in result.stderr


def test_without_json_stdout_is_empty(trained: Path, tmp_path: Path) -> None:
    sampled = succeed("sample", trained / "teacher", "--out", tmp_path)
    assert sampled.stdout == ""
    assert "NFE 4" in sampled.stderr


# Training ------------------------------------------------------------------------------------------------------------


def test_a_run_on_disk(trained: Path) -> None:
    run = trained / "progressive"
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "status.json", "environment.json", "metrics.jsonl", "checkpoints", "stages", "model")
    }
    status = json.loads((run / "status.json").read_text())
    assert list(status) == ["state", "step", "message", "exit_code", "pid", "host", "updated"]
    assert (status["state"], status["step"], status["exit_code"]) == ("done", 30, 0)
    card = json.loads((run / "model" / "config.json").read_text())
    teacher = json.loads((trained / "teacher" / "model" / "config.json").read_text())
    assert (card["role"], card["objective"], card["teacher"]) == ("student", "progressive", teacher["name"])
    assert card["teacher_digest"] == teacher["digests"]["model.safetensors"]
    assert {"convention", "ema", "config_digest", "commit"} <= set(card)
    assert (card["train"]["steps"], card["train"]["samples"]) == (30, 30 * 16)
    sampler = json.loads((run / "model" / "sampler.json").read_text())
    assert {steps: entry["weights"] for steps, entry in sampler["steps"].items()} == {
        "1": "model.safetensors",
        "2": "model-steps-2.safetensors",
        "4": "model-steps-4.safetensors",
    }
    assert {steps: entry["times"] for steps, entry in sampler["steps"].items()} == {
        "1": [1.0, 0.0],
        "2": [1.0, 0.5, 0.0],
        "4": [1.0, 0.75, 0.5, 0.25, 0.0],
    }
    assert "fewstep sample" in (run / "model" / "README.md").read_text()
    assert "torch" in json.loads((run / "environment.json").read_text())["packages"]


def test_the_card_tells_of_guidance(trained: Path, tmp_path: Path) -> None:
    command = ("distill", "digits-consistency", *SMALL[:2], f"teacher.path={trained / 'teacher'}", "train.steps=1")
    for scale in (1, 2.5):
        succeed(*command, f"teacher.guidance={scale}", "--out", tmp_path / f"{scale}")
        card = json.loads((tmp_path / f"{scale}" / "model" / "config.json").read_text())
        assert card["guidance"] == scale


def test_the_config_of_a_run_reproduces_it(trained: Path, tmp_path: Path) -> None:
    succeed("distill", trained / "meanflow" / "config.yaml", "--out", tmp_path / "again")
    same = "model/model.safetensors"
    assert (tmp_path / "again" / same).read_bytes() == (trained / "meanflow" / same).read_bytes()


def test_the_default_place_of_a_run_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("teach", "digits-teacher", *SMALL, "train.steps=1", "name=size-1")
    assert (tmp_path / "runs" / "size-1" / "model" / "config.json").is_file()


def test_a_student_from_a_closed_form(tmp_path: Path) -> None:
    """No teacher run, no labels to drop, points instead of images: the whole way on a toy."""
    run = tmp_path / "toy"
    small = ("train.steps=2", "train.batch_size=16", "student.network.width=16", "data.count=200", "evaluate.n=50")
    succeed("distill", "gaussians-meanflow", *small, "--out", run)
    results = document("evaluate", run, "--steps", "1,2")
    assert {(row["role"], row["objective"]) for row in results["rows"]} == {
        ("teacher", "exact"),
        ("student", "meanflow"),
    }
    assert document("sample", run, "--n", 5)["n"] == 5
    succeed("report", run)


# Sampling ------------------------------------------------------------------------------------------------------------


def drawn(run: Path, out: Path, *options: object) -> dict[str, torch.Tensor]:
    return load_file(document("sample", run, "--out", out, *options)["samples"])


@pytest.mark.parametrize(("name", "steps"), [("teacher", 3), ("meanflow", 3), ("progressive", 2), ("consistency", 3)])
def test_samples_do_not_depend_on_the_batch_size(name: str, steps: int, trained: Path, tmp_path: Path) -> None:
    run = trained / name
    small = drawn(run, tmp_path / "7", "--n", 64, "--steps", steps, "--batch-size", 7)
    large = drawn(run, tmp_path / "64", "--n", 64, "--steps", steps, "--batch-size", 64)
    # 1e-5 of the samples' scale is a thousandth of a grey level, which may still round to the next one.
    grey = (small["x"].int() - large["x"].int()).abs()
    assert grey.max() <= 1
    assert (grey > 0).float().mean() < 1e-3
    assert torch.equal(small["label"], torch.arange(64) % 10)


@pytest.mark.parametrize("name", ["teacher", "meanflow", "progressive", "consistency"])
def test_unrounded_samples_do_not_depend_on_the_batch_size(name: str, trained: Path) -> None:
    from fewstep.workflows import sample_run

    small, large = (sample_run(trained / name, steps=2, n=64, seed=3, batch_size=size).x for size in (7, 64))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)


def test_sample_i_comes_from_the_seed_and_i_alone(trained: Path, tmp_path: Path) -> None:
    run = trained / "meanflow"
    few, many = drawn(run, tmp_path / "5", "--n", 5), drawn(run, tmp_path / "9", "--n", 9)
    assert torch.equal(few["x"], many["x"][:5])
    other = drawn(run, tmp_path / "other", "--n", 5, "--seed", 1)
    assert not torch.equal(few["x"], other["x"])
    assert few["x"].dtype == torch.uint8
    assert (tmp_path / "5" / "steps-04-seed-0.png").read_bytes().startswith(b"\x89PNG")


# Evaluation and report -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of two students with a ``results.json`` each."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("meanflow", "progressive"):
        shutil.copytree(trained / name, folder / name)
        printed = document("evaluate", folder / name, "--steps", "1,2", "--features", "pixels")
        assert printed == json.loads((folder / name / "results.json").read_text())
    return folder


def test_results_hold_the_student_and_its_teacher(evaluated: Path) -> None:
    results = json.loads((evaluated / "meanflow" / "results.json").read_text())
    assert results["schema"] == SCHEMA == 1
    assert [(row["role"], row["steps"]) for row in results["rows"]] == [("teacher", 4), ("student", 1), ("student", 2)]
    for row in results["rows"]:
        assert {
            *("model", "role", "objective", "steps", "nfe", "guidance", "n", "seed", "metrics", "latency_ms"),
            *("images_per_s", "params"),
        } <= set(row)
        assert row["nfe"] == row["steps"]
        assert row["n"] == 100
        for metric in ("fd", "kd", "precision", "recall", "density", "coverage"):
            assert set(row["metrics"][f"{metric}_pixels"]) == {"value", "low", "high"}
        assert "fid" not in row["metrics"]
    assert {"dataset", "n", "extractors", "protocol"} <= set(results["reference"])
    assert "packages" in results["environment"]


def test_a_quality_gate_is_exit_code_4_after_the_results_are_written(copied: Copy) -> None:
    run = copied("meanflow")
    measure = ("evaluate", run, "--steps", "1", "--features", "pixels")
    failed = cli(*measure, "--max-fd", "1e-3", "--json")
    assert failed.exit_code == 4
    assert failed.stderr.splitlines()[-1].startswith("error: fd_pixels at 1 steps is ")
    assert json.loads(failed.stdout) == json.loads((run / "results.json").read_text())
    value = json.loads(failed.stdout)["rows"][-1]["metrics"]["fd_pixels"]["value"]
    assert cli(*measure, "--max-fd", value * 1.01).exit_code == 0
    assert cli(*measure, "--max-fd", value * 0.99).exit_code == 4
    low = cli(*measure, "--min-recall", "1.01")
    assert low.exit_code == 4
    assert "recall_pixels at 1 steps" in low.stderr


def test_a_gate_fails_on_a_number_that_is_none(copied: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewstep.evaluation.metrics

    monkeypatch.setattr(fewstep.evaluation.metrics, "frechet_distance", lambda *moments: float("nan"))
    measure = ("evaluate", copied("meanflow"), "--steps", "1", "--features", "pixels")
    assert cli(*measure, "--max-fd", "1e9").exit_code == 4


def test_the_gate_is_the_run_s_and_not_its_teacher_s(copied: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewstep.evaluation.sweep

    measure = fewstep.evaluation.sweep.measure

    def bad_teacher(*arguments: Any, **settings: Any) -> Finished:
        finished = measure(*arguments, **settings)
        value = 1e9 if finished.row.role == "teacher" else 1.0
        metrics = {**finished.row.metrics, "fd_pixels": Measured(value)}
        return Finished(dataclasses.replace(finished.row, metrics=metrics))

    monkeypatch.setattr(fewstep.evaluation.sweep, "measure", bad_teacher)
    command = ("evaluate", copied("meanflow"), "--steps", "1", "--features", "pixels", "--max-fd")
    assert cli(*command, 10).exit_code == 0
    assert cli(*command, 0.5).exit_code == 4


def test_a_failed_evaluation_keeps_the_old_results(evaluated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated / "progressive", tmp_path / "run"))
    before = contents(run)
    assert cli("evaluate", run, "--steps", "3").exit_code == 2
    assert contents(run) == before


def test_a_report_needs_nothing_but_the_results(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(evaluated / "meanflow" / "results.json", run)
    page = Path(document("report", run)["report"])
    assert page == run / "report" / "index.html"
    written = {path.name for path in page.parent.iterdir()}
    assert {"index.html", "report.md", "results.csv", "figures", "samples"} <= written
    assert "digits-meanflow" in page.read_text()


def test_a_report_of_two_runs(evaluated: Path, tmp_path: Path) -> None:
    runs = (evaluated / "meanflow", evaluated / "progressive")
    printed = document("report", *runs, "--out", tmp_path / "both")
    assert printed["rows"] == 5  # the teacher they share once, two step counts of each student
    text = (tmp_path / "both" / "report.md").read_text()
    assert "digits-meanflow" in text
    assert "digits-progressive" in text


def test_results_of_different_protocols_are_not_merged(evaluated: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    results = json.loads((evaluated / "progressive" / "results.json").read_text())
    results["reference"]["protocol"]["quantisation"] = "by hand"
    (other / "results.json").write_text(json.dumps(results))
    refuse(
        *("report", evaluated / "meanflow", other, "--out", tmp_path / "out"),
        says=("do not compare", "protocol", "by hand"),
    )
    assert not (tmp_path / "out").exists()


# On a terminal and elsewhere -----------------------------------------------------------------------------------------


def start_on_a_terminal(arguments: tuple[object, ...], cwd: Path, **environment: str) -> tuple[Forked, int]:
    """``fewstep ARGUMENTS`` with a terminal of 100 columns as stderr, and where to read what it shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = started(*arguments, cwd=cwd, stderr=theirs, TERM="xterm-256color", **environment)
    os.close(theirs)
    return process, ours


def shown_by(process: Forked, terminal: int) -> str:
    """Everything the process writes to its terminal until it ends well, with an empty stdout."""
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    out, _ = process.communicate()
    assert (process.returncode, out) == (0, ""), shown
    return shown.decode()


COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|9[0-7]|38;[25];[0-9;]+)m")


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    command = ("teach", "digits-teacher", *SMALL, "train.steps=30", "--out")
    terminal = start_on_a_terminal((*command, "a"), tmp_path)
    colourless = start_on_a_terminal((*command, "b"), tmp_path, NO_COLOR="1")
    pipe = started(*command, "c", cwd=tmp_path)

    shown = shown_by(*terminal)
    assert "━" in shown
    assert "30/30" in shown
    assert COLOUR.search(shown)

    plain = shown_by(*colourless)
    assert "━" in plain
    assert "30/30" in plain
    assert not COLOUR.search(plain)

    out, err = pipe.communicate()
    assert (pipe.returncode, out) == (0, "")
    assert "\x1b" not in err
    assert "\r" not in err
    *_, first, last = err.splitlines()
    assert first.startswith("digits-teacher: 30/30  flow matching  loss ")
    assert last.endswith("-> c")


def test_a_command_in_a_message_is_never_broken(tmp_path: Path) -> None:
    """It is there to be copied, however long it is."""
    elsewhere = tmp_path / "/".join(["a long name"] * 25) / "digits-teacher"
    line = refuse("distill", "digits-meanflow", f"teacher.path={elsewhere}", says=("fewstep teach digits-teacher",))
    assert line.count(str(elsewhere)) == 2


def test_the_entry_points_are_one(tmp_path: Path) -> None:
    for start in (["-m", "fewstep"], ["-m", "fewstep.cli"]):
        done = subprocess.run(
            [sys.executable, *start, "recipes", "list"], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert [line.split()[0] for line in done.stdout.splitlines()] == sorted([*recipe_names(), *comparison_names()])


def test_a_teacher_under_another_solver(trained: Path, tmp_path: Path) -> None:
    """Two Heun steps cost four evaluations, and the samples are those of the solver itself."""
    said = succeed(
        "sample", trained / "teacher", "--steps", 2, "--n", 5, "--solver", "heun", "--out", tmp_path, "--json"
    )
    document = json.loads(said.stdout)
    assert document["nfe"] == 4
    model = load_model(trained / "teacher", torch.device("cpu"))
    index = torch.arange(5)
    noise = Key(0).normal("noise", index, (1, 8, 8))
    expected = sample_ode(model.sampler.field, noise, uniform_grid(2), index % 10, "heun")  # type: ignore[attr-defined]
    drawn = load_file(document["samples"])["x"]
    assert torch.equal(drawn, to_uint8(expected.x))


def test_evaluation_with_another_solver(copied: Callable[[str], Path]) -> None:
    run = copied("teacher")
    succeed("evaluate", run, "--steps", "1,2", "--n", 50, "--solver", "midpoint", "--features", "pixels")
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"], row["sampler"]) for row in rows] == [(1, 2, "midpoint"), (2, 4, "midpoint")]


def test_a_student_takes_no_solver(trained: Path, tmp_path: Path) -> None:
    where = tmp_path / "x"
    refuse("sample", trained / "meanflow", "--solver", "heun", "--out", where, says=("--solver is for teachers",))
    assert not where.exists()
