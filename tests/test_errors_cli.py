"""What a user can get wrong: each is one sentence, exit code 2 (3 for the machine's lacks), and nothing is touched."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, cli, contents, refuse, shell, student
from forked import finished

Copy = Callable[[str], Path]


# Teachers ------------------------------------------------------------------------------------------------------------


def test_a_missing_teacher_names_the_command_that_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse("distill", "digits-meanflow", says=("runs/digits-teacher", "`fewstep teach digits-teacher`"))
    elsewhere = tmp_path / "my runs" / "digits-teacher"
    refuse(
        *("distill", "digits-meanflow", f"teacher.path={elsewhere}"),
        says=(f"`fewstep teach digits-teacher --out '{elsewhere}'`",),
    )
    refuse("distill", "digits-meanflow", "teacher.path=other", says=("`fewstep teach CONFIG --out other`",))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_data(trained: Path, tmp_path: Path) -> None:
    data = "data={kind: toy, name: eight_gaussians}"
    refuse(
        *("distill", "digits-meanflow", f"teacher.path={trained / 'teacher'}", data, "--out", tmp_path / "run"),
        says=("trained on digits", "toy-eight_gaussians"),
    )
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_data_of_the_same_shape(copied: Copy, tmp_path: Path) -> None:
    teacher = copied("teacher")
    edit(teacher / "model" / "config.json", lambda card: card["data"].update(name="letters"))
    refuse(
        *("distill", "digits-meanflow", *student(teacher), "--out", tmp_path / "run"),
        says=("trained on letters", "digits"),
    )


def test_a_student_is_no_teacher(trained: Path, tmp_path: Path) -> None:
    refuse(
        *("distill", "digits-meanflow", f"teacher.path={trained / 'meanflow'}", "--out", tmp_path / "run"),
        says=(str(trained / "meanflow"), "student", "not a teacher"),
    )


def test_an_unfinished_teacher(copied: Copy, tmp_path: Path) -> None:
    teacher = copied("teacher")
    shutil.rmtree(teacher / "model")
    refuse(
        *("distill", "digits-meanflow", f"teacher.path={teacher}", "--out", tmp_path / "run"),
        says=(str(teacher), "not ended", "--resume"),
    )


def test_a_folder_or_file_that_is_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        path = tmp_path / name
        refuse("distill", "digits-meanflow", f"teacher.path={path}", "--out", tmp_path / "run", says=(str(path),))


@pytest.mark.parametrize("teacher", ["{kind: analytic}", "{kind: analytic, guidance: 2}"])
def test_no_closed_form_for_digits(teacher: str, tmp_path: Path) -> None:
    scratch = ("student.init=scratch", "student.network={kind: mlp, width: 16, depth: 1}", "objective.velocity=teacher")
    refuse(
        *("distill", "digits-meanflow", f"teacher={teacher}", *scratch, "--out", tmp_path / "run"),
        says=("analytic", "digits", "mixture"),
    )


def test_guidance_without_classes(tmp_path: Path) -> None:
    data = "data={kind: toy, name: checkerboard, count: 100}"
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    assert cli("teach", "digits-teacher", *SMALL, data, "train.steps=1", "--out", teacher).exit_code == 0
    guided = ("teacher.guidance=2", "objective.velocity=teacher")
    refuse(
        *("distill", "digits-meanflow", *student(teacher), data, *guided, "--out", out),
        says=("teacher.guidance 2", "no classes"),
    )


def test_a_student_of_another_network_than_its_teacher(trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), "student.network={kind: mlp, width: 32, depth: 1}")
    refuse("distill", "digits-meanflow", *overrides, "--out", tmp_path / "run", says=("student.network", "scratch"))
    assert not (tmp_path / "run").exists()


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["objective.start_steps=7", "objective.start_steps=12", "objective.end_steps=64"])
def test_steps_that_cannot_be_halved(override: str, trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), override)
    refuse("distill", "digits-progressive", *overrides, "--out", tmp_path / "run", says=("halved",))
    assert not (tmp_path / "run").exists()


def test_a_stage_without_steps(trained: Path, tmp_path: Path) -> None:
    overrides = (*student(trained / "teacher"), "train.steps=1", "objective.last_stages_factor=0.1")
    refuse("distill", "digits-progressive", *overrides, "--out", tmp_path / "run", says=("4 -> 2 steps", "train.steps"))
    assert not (tmp_path / "run").exists()


def test_values_too_large_for_the_machine(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refuse("teach", "digits-teacher", "train.steps=5000000000", *out, says=("5000000000", "too many"))
    refuse("teach", "digits-teacher", "student.network.width=4000000", *out, says=("out of memory",), code=1)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_among_the_processes(tmp_path: Path) -> None:
    refuse(
        *("teach", "digits-teacher", "train.batch_size=15", "--processes", 2, "--out", tmp_path / "run"),
        says=("train.batch_size 15", "2 processes"),
    )
    microbatches = ("train.batch_size=12", "train.gradient_accumulation_steps=4")
    refuse(
        *("teach", "digits-teacher", *microbatches, "--processes", 2, "--out", tmp_path / "run"),
        says=("train.batch_size 12", "8 microbatches on 2 processes"),
    )
    assert not (tmp_path / "run").exists()


# Run directories -----------------------------------------------------------------------------------------------------


def test_an_existing_run_is_left_alone(copied: Copy) -> None:
    run = copied("teacher")
    before = contents(run)
    recipe = ("digits-teacher", *SMALL, "train.steps=20")
    refuse("teach", *recipe, "--out", run, says=(str(run), "--resume", "--overwrite"))
    refuse("teach", *recipe, "--out", run, "--processes", 2, says=(str(run), "--resume", "--overwrite"))
    refuse("teach", *recipe, "--out", run, "--resume", "--overwrite", says=("exclude each other",))
    assert contents(run) == before


def test_overwrite_starts_again_in_an_empty_directory(copied: Copy) -> None:
    run = copied("teacher")
    (run / "notes.txt").write_text("of the old run")
    assert cli("teach", "digits-teacher", *SMALL, "train.steps=2", "--out", run, "--overwrite").exit_code == 0
    assert not (run / "notes.txt").exists()
    assert json.loads((run / "model" / "config.json").read_text())["train"]["steps"] == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_overwrite_deletes_nothing_that_is_not_a_run(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")
    refuse("teach", "digits-teacher", "--out", thesis, "--overwrite", says=(str(thesis), "not a run directory"))
    refuse("demo", "--out", thesis / "chapter.tex", "--overwrite", says=("chapter.tex", "not a folder"))
    assert contents(thesis) == {"chapter.tex": b"years of work"}


def test_overwrite_deletes_nothing_when_the_request_is_wrong(copied: Copy, tmp_path: Path) -> None:
    run = copied("meanflow")
    before = contents(run)
    overwrite = ("--out", run, "--overwrite")
    refuse(
        "distill", "digits-meanflow", f"teacher.path={tmp_path / 'none'}", *overwrite, says=("has not been trained",)
    )
    refuse("distill", "digits-meanflow", "train.steps=none", *overwrite, says=("train.steps",))
    assert contents(run) == before


def test_a_student_does_not_overwrite_its_teacher(copied: Copy) -> None:
    teacher = copied("teacher")
    before = contents(teacher)
    for flags in (("--overwrite",), ("--resume",)):
        refuse(
            *("distill", "digits-meanflow", *student(teacher), "--out", teacher, *flags),
            says=(str(teacher), "teacher", "--out"),
        )
    assert contents(teacher) == before


def test_the_demo_checks_every_run_before_it_overwrites_the_first(copied: Copy, trained: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(trained / "teacher", demo / "digits-teacher")
    (demo / "digits-meanflow").mkdir()
    (demo / "digits-meanflow" / "precious").write_text("x")
    before = contents(demo)
    refuse("demo", "--out", demo, "--overwrite", says=("digits-meanflow", "not a run directory"))
    refuse("demo", "--out", demo, says=(str(demo), "--resume", "--overwrite"))
    refuse("demo", "--out", demo, "--resume", "--overwrite", says=("exclude each other",))
    assert contents(demo) == before


def test_a_place_where_nothing_can_be_written(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for place in (file, file / "below"):
        refuse("teach", "digits-teacher", *SMALL, "--out", place, says=(str(file), "not a folder"))
        refuse("teach", "digits-teacher", *SMALL, "--out", place, "--overwrite", says=(str(file), "not a folder"))
        refuse("sample", trained / "teacher", "--out", place, says=(str(file), "not a folder"))
        refuse("demo", "--out", place, says=(str(file), "not a folder"))
    refuse("report", trained / "teacher", "--out", file, says=("results.json",))
    refuse("teach", "digits-teacher", *SMALL, "--out", tmp_path / ("x" * 300), says=("too long",))
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    refuse("teach", "digits-teacher", *SMALL, "--out", closed / "run", says=("permission", str(closed)))


# --resume ------------------------------------------------------------------------------------------------------------


def resume(run: Path, *overrides: str, says: tuple[str, ...]) -> None:
    before = contents(run)
    refuse("teach", "digits-teacher", *SMALL, "train.steps=20", *overrides, "--out", run, "--resume", says=says)
    assert contents(run) == before


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def test_nothing_to_resume(copied: Copy, tmp_path: Path) -> None:
    refuse("teach", "digits-teacher", "--out", tmp_path / "none", "--resume", says=("nothing to resume", "none"))
    run = copied("teacher")
    shutil.rmtree(run / "checkpoints")
    resume(run, says=("nothing to resume", "checkpoints"))
    assert not (tmp_path / "none").exists()


def test_a_truncated_checkpoint(copied: Copy) -> None:
    run = copied("teacher")
    file = newest(run) / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    resume(run, says=(str(file), "damaged or truncated"))


def test_a_checkpoint_that_lacks_a_file(copied: Copy) -> None:
    run = copied("teacher")
    (newest(run) / "optimizer.safetensors").unlink()
    resume(run, says=("optimizer.safetensors", "missing"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"digests": 3}', "\ufeff"])
def test_a_damaged_state(text: str, copied: Copy) -> None:
    run = copied("teacher")
    (newest(run) / "state.json").write_text(text)
    resume(run, says=("state.json", "damaged"))


def test_resuming_with_another_config(copied: Copy) -> None:
    run = copied("teacher")
    resume(run, "train.lr=0.5", "seed=4", says=("seed was 0 and is 4", "train.lr was", "is 0.5", "--overwrite"))


def test_resuming_where_the_config_is_gone_or_damaged(copied: Copy) -> None:
    run = copied("teacher")
    (run / "config.yaml").write_text("name: [")
    resume(run, says=("config.yaml", "YAML"))
    (run / "config.yaml").unlink()
    resume(run, says=("config.yaml",))


def test_resuming_after_the_teacher_changed(copied: Copy, trained: Path, tmp_path: Path) -> None:
    teacher, run = copied("teacher"), tmp_path / "run"
    recipe = ("distill", "digits-meanflow", *student(teacher), "train.steps=2", "--out", run)
    assert cli(*recipe).exit_code == 0
    again = ("teach", "digits-teacher", *SMALL, "train.steps=2", "--out", teacher, "--overwrite")
    assert cli(*again).exit_code == 0
    before = contents(run)
    refuse(*recipe, "--resume", says=("teacher", "weights have changed"))
    assert contents(run) == before


# Damaged runs --------------------------------------------------------------------------------------------------------


def unusable(run: Path, says: tuple[str, ...], *commands: str) -> None:
    before = contents(run)
    for command in commands or ("sample", "evaluate"):
        steps = ("--steps", "1")
        refuse(command, run, *steps, says=says)
    assert contents(run) == before


def test_a_run_that_does_not_exist(tmp_path: Path) -> None:
    for command in ("sample", "evaluate"):
        refuse(command, tmp_path / "none", says=("no run at", "none"))
    refuse("report", tmp_path / "none", says=("none/results.json", "fewstep evaluate"))
    file = tmp_path / "file"
    file.write_text("x")
    refuse("sample", file, says=("no run at", str(file)))
    refuse("report", file, says=("results.json",))


def test_truncated_weights(copied: Copy) -> None:
    run = copied("meanflow")
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    unusable(run, ("model.safetensors", "damaged or truncated"))
    file.unlink()
    unusable(run, ("model.safetensors", "missing"))


def test_one_flipped_bit_in_the_weights(copied: Copy) -> None:
    run = copied("meanflow")
    file = run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    unusable(run, ("model.safetensors", "damaged"))


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


CARDS: dict[str, Callable[[dict], object]] = {
    "no role": lambda card: card.pop("role"),
    "no digests": lambda card: card.pop("digests"),
    "digests without the file": lambda card: card.update(digests={}),
    "no data shape": lambda card: card["data"].pop("shape"),
    "no training": lambda card: card.pop("train"),
    "no step count": lambda card: card["train"].pop("steps"),
    "unknown role": lambda card: card.update(role="critic"),
    "unknown student": lambda card: card.update(student="oracle"),
    "another network": lambda card: card["network"].update(width=24),
    "no network": lambda card: card.update(network={}) or card["network"].update(kind="cnn"),
    "a list as network": lambda card: card.update(network=[1]),
    "a word as shape": lambda card: card["data"].update(shape="8x8"),
    "a word as guidance": lambda card: card.update(guidance="strong"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_damaged_card(case: str, copied: Copy) -> None:
    run = copied("meanflow")
    edit(run / "model" / "config.json", CARDS[case])
    unusable(run, ("model", "this version knows" if case == "unknown student" else "damaged"))


@pytest.mark.parametrize("case", ["no role", "another network", "no data shape", "digests without the file"])
def test_a_teacher_with_a_damaged_card(case: str, copied: Copy, tmp_path: Path) -> None:
    teacher = copied("teacher")
    edit(teacher / "model" / "config.json", CARDS[case])
    refuse(
        *("distill", "digits-meanflow", *student(teacher), "--out", tmp_path / "run"),
        says=(str(teacher), "damaged"),
    )
    assert not (tmp_path / "run").exists()


SAMPLERS: dict[str, Callable[[dict], object]] = {
    "no rule": lambda sampler: sampler.pop("sampler"),
    "unknown rule": lambda sampler: sampler.update(sampler="leap"),
    "no steps": lambda sampler: sampler.pop("steps"),
    "a list of steps": lambda sampler: sampler.update(steps=[0]),
    "a word as step count": lambda sampler: sampler.update(steps={"few": {"weights": "model.safetensors"}}),
    "no weights": lambda sampler: sampler.update(steps={"0": {}}),
    "weights elsewhere": lambda sampler: sampler.update(steps={"0": {"weights": "../../other.safetensors"}}),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_a_damaged_sampler(case: str, copied: Copy) -> None:
    run = copied("meanflow")
    edit(run / "model" / "sampler.json", SAMPLERS[case])
    unusable(run, ("model", "damaged"))


def test_an_unknown_solver(copied: Copy) -> None:
    run = copied("teacher")
    edit(run / "model" / "sampler.json", lambda sampler: sampler.update(solver="rk45"))
    unusable(run, ("damaged", "rk45"))


@pytest.mark.parametrize("name", ["config.json", "sampler.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\udcff"])
def test_files_of_a_model_that_are_not_json(name: str, text: str, copied: Copy) -> None:
    run = copied("meanflow")
    (run / "model" / name).write_bytes(text.encode(errors="surrogateescape"))
    unusable(run, (name, "damaged"))


def test_a_model_of_another_format(copied: Copy) -> None:
    run = copied("meanflow")
    edit(run / "model" / "config.json", lambda card: card.update(format=99))
    unusable(run, ("format 99", "reads 1"))


@pytest.mark.parametrize("text", ["", "- 1\n", "name: [", "name: x\n", "\udcff"])
def test_a_damaged_config(text: str, copied: Copy) -> None:
    run = copied("meanflow")
    (run / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
    unusable(run, ("config.yaml",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "rows": [3]}',
        '{"schema": 1, "rows": []}',
        '{"schema": 1, "rows": [{"metrics": []}]}',
        "\udcff",
    ],
)
def test_damaged_results(text: str, copied: Copy) -> None:
    run = copied("meanflow")
    (run / "results.json").write_bytes(text.encode(errors="surrogateescape"))
    before = contents(run)
    refuse("report", run, says=("results",))
    assert contents(run) == before


# Steps, features, options --------------------------------------------------------------------------------------------


def test_step_counts_that_a_student_was_not_trained_for(trained: Path) -> None:
    run = trained / "progressive"
    before = contents(run)
    refuse("sample", run, "--steps", 3, says=("trained for 1, 2, 4 steps", "not for 3"))
    refuse("evaluate", run, "--steps", "1,3", says=("trained for 1, 2, 4 steps", "not for 3"))
    refuse("evaluate", run, says=("trained for 1, 2, 4 steps", "not for 8"))  # the config's steps
    assert contents(run) == before


@pytest.mark.parametrize("text", ["", "one", "1,,2", "1.5", "0", "-1", "1;2", "1,2,", "٣x"])
def test_step_counts_that_are_not_numbers(text: str, trained: Path) -> None:
    refuse("evaluate", trained / "meanflow", f"--steps={text}", says=("--steps",))


def test_unknown_features(trained: Path) -> None:
    run = trained / "meanflow"
    before = contents(run)
    refuse("evaluate", run, "--features", "pixel", says=("'pixel'", "did you mean 'pixels'?"))
    refuse("evaluate", run, "--features", "pixels,", says=("''", "known: "))
    assert contents(run) == before


def test_features_of_images_for_points(tmp_path: Path) -> None:
    run = tmp_path / "points"
    data = "data={kind: toy, name: mixture, count: 100}"
    assert cli("teach", "digits-teacher", *SMALL, data, "train.steps=1", "--out", run).exit_code == 0
    for features in ("pixels", "digits"):
        refuse("evaluate", run, "--features", features, "--n", 20, says=(features, "points", "use identity"))


def test_too_few_samples(trained: Path) -> None:
    refuse("evaluate", trained / "meanflow", "--n", 3, "--steps", 1, says=("3 samples", "need 4"))


def test_inception_without_its_weights(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewstep.workflows

    def sweep(*arguments: object, **settings: object) -> None:
        pytest.fail("sampling started")

    monkeypatch.setattr(fewstep.workflows, "sweep", sweep)
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    says = ("inception-2015-12-05.pt", "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4", "--weights")
    run = trained / "meanflow"
    refuse("evaluate", run, "--features", "pixels,inception", "--weights", tmp_path / "none", says=says, code=3)
    if not Path("/tmp/inception-2015-12-05.pt").exists():
        refuse("evaluate", run, "--features", "inception", says=says, code=3)
    wrong = tmp_path / "inception-2015-12-05.pt"
    wrong.write_bytes(b"not a network")
    refuse("evaluate", run, "--features", "inception", "--weights", wrong, says=(str(wrong), "SHA-256"), code=3)


def test_two_models_of_one_name_in_one_table(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = (*student(trained / "teacher"), "train.steps=1", "name=digits-teacher")
    assert cli("distill", "digits-meanflow", *overrides, "--out", run).exit_code == 0
    refuse("evaluate", run, "--steps", 1, says=("same name", "digits-teacher"))


def test_a_gate_is_a_finite_number(trained: Path) -> None:
    for option in ("--max-fd", "--min-recall"):
        refuse("evaluate", trained / "meanflow", option, "nan", says=(option, "nan"))


def test_several_runs_need_a_place_for_their_report(trained: Path) -> None:
    refuse("report", trained / "meanflow", trained / "progressive", says=("--out",))


OPTIONS = [
    ("distill", "digits-meanflow", "--steps", "3"),
    ("distill", "digits-meanflow", "--seed", "-1"),
    ("distill", "digits-meanflow", "--seed", "x"),
    ("distill", "digits-meanflow", "--processes", "0"),
    ("sample", "run", "--steps", "0"),
    ("sample", "run", "--n", "-5"),
    ("sample", "run", "--batch-size", "0"),
    ("sample", "run", "--seed", "1.5"),
    ("evaluate", "run", "--n", "1"),
    ("evaluate", "run", "--max-fd", "low"),
    ("demo", "--n", "3"),
    ("demo", "extra"),
    ("teach",),
    ("sample",),
    ("report",),
    ("recipes", "delete"),
    ("distil", "digits-meanflow"),
    ("--frobnicate",),
]


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_a_wrong_option_is_exit_code_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# As processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mistake_has_no_traceback_in_a_process_of_its_own(trained: Path, tmp_path: Path) -> None:
    out = finished("distill", "digits-meanflow", "train.stps=1", "--json", cwd=tmp_path)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr == "error: digits-meanflow: train.stps: unknown key; did you mean 'steps'?\n"
    out = finished("sample", trained / "progressive", "--steps", 3, "--json", cwd=tmp_path)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.count("\n") == 1
    assert "not for 3" in out.stderr
    out = shell("teach", "ünbekannt", cwd=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (out.returncode, out.stdout) == (2, "")
    assert "Traceback" not in out.stderr
    assert sys.executable
    assert list(tmp_path.iterdir()) == []


def test_a_defect_keeps_its_traceback(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can mend becomes a sentence."""
    import fewstep.workflows

    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("an internal contradiction")

    monkeypatch.setattr(fewstep.workflows, "sample_run", broken)
    with pytest.raises(RuntimeError, match="contradiction"):
        cli("sample", trained / "teacher")
