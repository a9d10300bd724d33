"""``fewstep compare`` from beginning to end, small: two students, two seeds, one table."""

import json
import shlex
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, cli, contents, refuse, succeed
from typer.testing import CliRunner

from fewstep.cli import app

TEACHER, STUDENTS = "digits-teacher", ("digits-meanflow", "digits-progressive")
TINY = """\
name: tiny
teacher: digits-teacher
students: [digits-meanflow, digits-progressive]
seeds: [0, 1]
set: {train.steps: 6, train.batch_size: 16, train.log_every: 1}
set_for:
  digits-progressive: {train.steps: 1, objective.start_steps: 4}
set_teacher:
  train.steps: 10
  train.batch_size: 16
  train.log_every: 1
  student.network: {kind: mlp, width: 16, depth: 1}
evaluate: {steps: [1, 2, 4], teacher_steps: [1, 4], n: 100, features: [pixels, digits]}
"""
TRAINING = 10 + 6 + 2 * 2
"""Optimiser steps of a seed: teacher, MeanFlow, and two stages of twice one step."""
ROWS = 2 + 3 + 2
"""Rows of a seed: progressive distillation from 4 steps serves 2 and 1."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def compared(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, for tests that only read it."""
    out = tmp_path_factory.mktemp("compare") / "tiny runs"
    result = succeed("compare", recipe, "--out", out, "--json")
    assert json.loads(result.stdout) == read(out)
    assert f"report -> {out / 'report' / 'index.html'}" in result.stderr
    assert "warning: the students' budgets differ, in samples seen: digits-meanflow 96, digits-progr" in result.stderr
    return out


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def weights(out: Path, seeds: tuple[int, ...] = (0, 1)) -> dict[str, bytes]:
    files = [
        out / f"seed-{seed}" / name / "model" / "model.safetensors" for seed in seeds for name in (TEACHER, *STUDENTS)
    ]
    return {str(file.relative_to(out)): file.read_bytes() for file in files if file.is_file()}


def numbers(folder: Path) -> dict[str, Any]:
    """Everything in ``results.json`` but what a clock measured."""
    results = read(folder)
    for row in results["rows"]:
        del row["latency_ms"], row["latency_p95_ms"], row["images_per_s"], row["batch"]
    for model in results["models"]:
        del model["train_s"]
    return results


@contextmanager
def stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Asked to stop at the question after so many, be it training or measuring that asks."""
    import fewstep.interrupts

    asked = iter([*[False] * calls, True])

    @contextmanager
    def later() -> Iterator[Callable[[], bool]]:
        yield lambda: next(asked)

    with monkeypatch.context() as patch:
        patch.setattr(fewstep.interrupts, "stop_requested", later)
        yield


# Runs and results ----------------------------------------------------------------------------------------------------


def test_each_seed_has_a_teacher_of_its_own_and_students_of_it(compared: Path, recipe: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in compared.iterdir()) == [
        *("comparison.yaml", "report", "results.json", "seed-0", "seed-1"),
    ]
    teachers = []
    for seed in (0, 1):
        cards = {
            name: json.loads((compared / f"seed-{seed}" / name / "model" / "config.json").read_text())
            for name in (TEACHER, *STUDENTS)
        }
        teachers.append(cards[TEACHER]["digests"]["model.safetensors"])
        assert [cards[name]["teacher_digest"] for name in STUDENTS] == [teachers[-1]] * 2
        assert [card["train"]["steps"] for card in cards.values()] == [10, 6, 4]
        configs = [yaml.safe_load((compared / f"seed-{seed}" / name / "config.yaml").read_text()) for name in cards]
        assert [config["seed"] for config in configs] == [seed] * 3
    assert teachers[0] != teachers[1]
    assert len(set(weights(compared).values())) == 6
    # What it trains is what `fewstep distill` trains.
    own = (*SMALL[:2], "train.steps=6", f"teacher.path={compared / 'seed-1' / TEACHER}")
    succeed("distill", STUDENTS[0], *own, "--seed", 1, "--out", tmp_path / "alone")
    alone = (tmp_path / "alone" / "model" / "model.safetensors").read_bytes()
    assert alone == weights(compared)[f"seed-1/{STUDENTS[0]}/model/model.safetensors"]


def test_a_row_is_the_mean_over_the_seeds_with_their_standard_deviation(compared: Path) -> None:
    merged, seeds = read(compared), [read(compared / f"seed-{seed}") for seed in (0, 1)]
    assert merged["schema"] == 1
    rows = [(row["model"], row["steps"]) for row in merged["rows"]]
    assert rows == [
        *((TEACHER, steps) for steps in (1, 4)),
        *((STUDENTS[0], steps) for steps in (1, 2, 4)),
        *((STUDENTS[1], steps) for steps in (1, 2)),
    ]
    spreads = []
    for i, row in enumerate(merged["rows"]):
        a, b = (results["rows"][i] for results in seeds)
        assert [(one["model"], one["steps"], one["seed"]) for one in (a, b)] == [(*rows[i], 0), (*rows[i], 1)]
        assert "seeds" not in a
        assert (row["seeds"], row["n"], row["seed"]) == (2, 100, 0)
        assert set(row["metrics"]) == set(a["metrics"])
        for name, found in row["metrics"].items():
            pair = [a["metrics"][name]["value"], b["metrics"][name]["value"]]
            assert "sd" not in a["metrics"][name]
            assert found["value"] == pytest.approx(statistics.mean(pair), rel=1e-12)
            assert found["sd"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5, rel=1e-9, abs=1e-12)
            spreads.append(found["sd"])
        for clock in ("latency_ms", "images_per_s"):
            assert row[clock] == pytest.approx(statistics.median([a[clock], b[clock]]))
        assert row["digest"] == f"{a['digest']}, {b['digest']}"
        assert row["samples_png"] == a["samples_png"] != b["samples_png"]
    assert sum(spread > 0 for spread in spreads) > len(spreads) / 2
    assert merged["reference"]["training_seeds"] == [0, 1]


def test_the_report_shows_all_models_in_one_table(compared: Path) -> None:
    text = (compared / "report" / "report.md").read_text()
    table = next(block for block in text.split("\n\n") if "fd_pixels ↓ at 1" in block)
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    metrics = ("fd_pixels ↓", "fd_digits ↓", "recall_pixels ↑")
    assert heads[1:] == [f"{metric} at {steps}" for metric in metrics for steps in (1, 2, 4)]
    shown = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert list(shown) == [TEACHER, *STUDENTS]
    for steps in (1, 2, 4):
        cell = shown[STUDENTS[1]][f"fd_pixels ↓ at {steps}"]
        assert (cell == "–") == (steps == 4)
        assert ("±" in cell) == (steps != 4)
    assert shown[TEACHER]["recall_pixels ↑ at 2"] == "–"
    assert "mean and standard deviation over 2 trainings" in text.lower()


def test_one_seed_is_as_it_was_measured_and_can_be_measured_otherwise(
    recipe: Path, compared: Path, tmp_path: Path
) -> None:
    """Fewer seeds and students on the line; a spread needs two trainings."""
    line = ("compare", recipe, "seeds=[1]", "students=[digits-progressive]", "--out", tmp_path)
    assert "budgets" not in succeed(*line).stderr
    assert not (tmp_path / "seed-0").exists()
    assert not (tmp_path / "seed-1" / STUDENTS[0]).exists()
    assert read(tmp_path) == read(tmp_path / "seed-1")
    assert "±" not in (tmp_path / "report" / "report.md").read_text()
    both = {(row["model"], row["steps"]): row["metrics"] for row in numbers(compared / "seed-1")["rows"]}
    for row in numbers(tmp_path)["rows"]:
        assert row["metrics"] == both[row["model"], row["steps"]]
    models = weights(tmp_path)
    succeed(*line, "evaluate.steps=[2]", "--resume")
    assert [row["steps"] for row in read(tmp_path)["rows"]] == [1, 4, 2]
    assert weights(tmp_path) == models


# Interrupts, failures, --resume --------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_line_it_prints_goes_on_to_the_same_bits(
    recipe: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second training of the second seed, and, gone on, once more while the second seed is measured."""
    out = tmp_path / "a comparison"
    with stopped_after(TRAINING + ROWS + 10 + 3, monkeypatch):
        result = cli("compare", recipe, "--out", out)
    assert (result.exit_code, result.stdout) == (130, "")
    line = result.stderr.splitlines()[-1].partition(": fewstep ")[2]
    assert not (out / "results.json").exists()
    before = contents(out / "seed-0")
    with stopped_after(2 + 4 + 2, monkeypatch):  # the rest of MeanFlow, progressive distillation, two rows
        result = cli(*shlex.split(line))
    assert result.exit_code == 130
    assert f"stopped after 3 of {ROWS} rows" in result.stderr
    assert result.stderr.splitlines()[-1].partition(": fewstep ")[2] == line
    succeed(*shlex.split(line))
    assert contents(out / "seed-0") == before  # not measured again either: clocks would tell
    assert weights(out) == weights(compared)
    assert numbers(out) == numbers(compared)


def test_stopped_while_a_run_makes_its_first_pairs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no checkpoint yet: what was made stays."""
    own = "set_for.digits-reflow."
    settings = ("train.steps=2", "objective.pairs.count=64", "objective.pairs.shard_size=16", "objective.pairs.steps=2")
    chosen = ("seeds=[0]", "students=[digits-reflow]", *(own + setting for setting in settings), "evaluate.steps=[1]")
    line = ("compare", recipe, *chosen, "--out", tmp_path)
    with stopped_after(10 + 3, monkeypatch):  # the teacher, and three of four files of pairs
        assert cli(*line).exit_code == 130
    folder = tmp_path / "seed-0" / "digits-reflow" / "pairs" / "round-1"
    made = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert len(made) in (2, 3)
    succeed(*line, "--resume")
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert len(list(folder.glob("shard-*"))) == 4


def test_a_failing_run_is_named_and_the_others_stay(recipe: Path, tmp_path: Path) -> None:
    arguments = ["compare", recipe, "seeds=[0]", "set_for.digits-meanflow.train.lr=1e38", "--out", tmp_path]
    result = cli(*arguments)
    assert result.exit_code == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path / 'seed-0' / 'digits-meanflow'}: ")
    assert "finite" in said
    assert said.endswith(f"go on with: fewstep {shlex.join(map(str, arguments))} --resume")
    assert (tmp_path / "seed-0" / TEACHER / "model" / "config.json").is_file()
    assert not (tmp_path / "results.json").exists()


def test_a_defect_keeps_its_traceback_and_the_run_is_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewstep.comparison.run

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(fewstep.comparison.run, "run_training", broken)
    result = CliRunner().invoke(app, ["compare", str(recipe), "--out", str(tmp_path)])
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.stderr.splitlines()[-1].startswith(f"{tmp_path / 'seed-0' / TEACHER} failed. ")


# --dry-run -----------------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_comparison_and_its_runs_and_writes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("compare", recipe, "seeds=[3, 5]", "set.train.lr=0.5", "evaluate.n=50", "--dry-run")
    printed = succeed(*line).stdout
    document = json.loads(succeed(*line, "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    tree = yaml.safe_load(printed)
    assert tree == document["comparison"]
    assert (tree["seeds"], tree["evaluate"]["n"]) == ([3, 5], 50)
    assert tree["set"] == {"train.steps": 6, "train.batch_size": 16, "train.log_every": 1, "train.lr": 0.5}
    runs = [(run["path"], run["steps"], run["samples"]) for run in document["runs"]]
    assert runs == [
        (f"runs/tiny/seed-{seed}/{name}", steps, steps * 16)
        for seed in (3, 5)
        for name, steps in zip((TEACHER, *STUDENTS), (10, 6, 4), strict=True)
    ]
    for path, *_ in runs:
        assert path.removeprefix("runs/tiny/") in printed
    # What is printed is a comparison again, the same one.
    (tmp_path / "again.yaml").write_text(printed)
    assert yaml.safe_load(succeed("compare", "again.yaml", "--dry-run").stdout) == tree


@pytest.mark.parametrize("name", ["demo", "digits-all"])
def test_the_comparisons_that_ship_are_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = json.loads(succeed("compare", name, "--dry-run", "--json").stdout)["runs"]
    if name == "digits-all":  # equal budgets, to 1 %
        samples = [run["samples"] for run in runs if run["name"] != TEACHER]
        assert max(samples) <= 1.01 * min(samples)


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("students=[digits-meanflo]",), ("'digits-meanflo'", "did you mean 'digits-meanflow'?")),
        (("students=[digits-meanflow, digits-meanflow]",), ("students", "digits-meanflow is listed twice")),
        (("students=[]",), ("students", "at least 1")),
        (("students=[digits-teacher]",), ("students: digits-teacher trains a teacher",)),
        (("students=[digits-all]",), ("digits-all is a comparison",)),
        (("students=[moons-progressive]",), ("moons-progressive has other data than digits-teacher",)),
        (("students=[gaussians-meanflow]", "set={}"), ("gaussians-meanflow", "kind analytic", "of kind run")),
        (("teacher=digits-meanflow",), ("teacher: digits-meanflow trains a student",)),
        (("seeds=[0, 0]",), ("seeds", "0 is listed twice")),
        (("seeds=[-1]",), ("seeds.0", "greater than or equal to 0")),
        (("seeds=0",), ("seeds", "got 0")),
        (("studens=[digits-meanflow]",), ("studens: unknown key; did you mean 'students'?",)),
        (("evaluate.m=3",), ("evaluate.m: unknown key",)),
        (("evaluate.n=3",), ("3 samples are too few",)),
        (("evaluate.features=[pixel]",), ("pixel",)),
        (("evaluate.steps=[3, 5]",), ("evaluate.steps asks for 3, 5", "digits-progressive serves 1, 2")),
        (("set.train.stepz=3",), ("digits-meanflow: train.stepz: unknown key; did you mean 'steps'?",)),
        (("set.seed=3",), ("set.seed", "the seeds are those of the comparison")),
        (("set.evaluate.n=3",), ("set.evaluate.n", "evaluate block of the comparison")),
        (("set.teacher.path=x",), ("set.teacher.path", "the teacher of the comparison")),
        (("set.train={steps: 3}",), ("set.train would replace the whole block: write train.steps",)),
        (("set_for.digits-consistency.train.lr=1",), ("set_for takes a student and a key",)),
        (("set.train.steps=[",), ("override set.train.steps: '[' is not a YAML value",)),
        (("seeds",), ("'seeds' is not an override",)),
        # What does not fit the teacher, which is not trained yet.
        (("set.student.network={kind: mlp, width: 8, depth: 1}",), ("digits-meanflow: student.network differs",)),
        (("set_teacher.train.batch_size=16", "set.train.gradient_accumulation_steps=3"), ("does not divide",)),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    overrides: tuple[str, ...], says: tuple[str, ...], recipe: Path, tmp_path: Path
) -> None:
    refuse("compare", recipe, *overrides, "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_a_student_of_a_misspelt_name_in_set_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TINY.replace("  digits-progressive:", "  digits-progresive:"))
    says = ("set_for.digits-progresive", "did you mean 'digits-progressive'?")
    refuse("compare", path, "--out", tmp_path / "out", says=says)


def test_commands_and_recipes_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("teach", "distill"):
        refuse(command, "digits-all", says=("digits-all is a comparison", "`fewstep compare digits-all`"))
    refuse("compare", "digits-meanflow", says=("one run", "`fewstep distill digits-meanflow`"))
    refuse("compare", "digits-teacher", says=("one run", "`fewstep teach digits-teacher`"))
    refuse("compare", "digits-al", says=("'digits-al'", "did you mean 'digits-all'?"))


def test_a_folder_that_is_taken(recipe: Path, compared: Path, tmp_path: Path) -> None:
    before = contents(compared)
    refuse("compare", recipe, "--out", compared, says=(str(compared), "--resume", "--overwrite"))
    refuse("compare", recipe, "--out", compared, "--resume", "--overwrite", says=("exclude each other",))
    other = ("set_for.digits-meanflow.train.lr=0.5", "--out", compared, "--resume")
    refuse("compare", recipe, *other, says=(f"seed-0/{STUDENTS[0]} was trained with another config", "train.lr"))
    (tmp_path / "seed-1" / TEACHER).mkdir(parents=True)
    (tmp_path / "seed-1" / TEACHER / "letter").write_text("keep me")
    refuse("compare", recipe, "--out", tmp_path, "--overwrite", says=("not a run directory",))
    assert list(tmp_path.iterdir()) == [tmp_path / "seed-1"]
    assert contents(compared) == before
