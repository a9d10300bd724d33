"""Reflow as runs: stages with pairs of their own, stops and kills among them, what is exported and what it serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import cli, contents, refuse, student, succeed

from fewstep.checkpoint import RunDirectory, read_model, read_tensors
from fewstep.config import RunConfig, load_config
from fewstep.data.load import digits
from fewstep.data.pairs import read_pairs
from fewstep.distill.plan import plan
from fewstep.distill.reflow.objective import PseudoHuber, Reflow
from fewstep.distill.reflow.windows import PiecewiseReflow
from fewstep.distill.run import Interrupted, run_training
from fewstep.errors import UsageError
from fewstep.flow import COSINE
from fewstep.keys import Key
from fewstep.sampling import FieldSampler
from fewstep.students.load import load_model
from fewstep.teachers.config import RunTeacher
from fewstep.teachers.load import load_teacher
from fewstep.teachers.network import NetworkField

CPU = torch.device("cpu")
PAIRS = "objective.pairs={count: 96, steps: 3, batch_size: 16, shard_size: 32}"
RUNS = {
    # Stages of 4 steps each: two rounds and a distillation to one step.
    "reflow": ("digits-reflow", (PAIRS, "objective.rounds=2", "train.steps=4", "train.checkpoint_every=3")),
    "windows": ("digits-proreflow", ("train.steps=3", "train.checkpoint_every=2", "objective.windows=[4, 2]")),
}


def overrides(name: str, trained: Path) -> tuple[str, ...]:
    return (*student(trained / "teacher"), "evaluate.steps=[1, 4]", *RUNS[name][1])


def config_of(name: str, trained: Path) -> RunConfig:
    return load_config(RUNS[name][0], overrides(name, trained))


def train(
    config: RunConfig, run: Path, *, resume: bool = False, stop: Callable[[int, int], bool] | None = None
) -> None:
    """Train to the end, or until ``stop`` says so of the last step and of how often progress was told."""
    seen = [0, 0]

    def stopped() -> bool:
        return stop is not None and stop(*seen)

    for progress in run_training(config, RunDirectory(run), resume=resume, overwrite=False, stopped=stopped):
        seen[:] = [progress.step, seen[1] + 1]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


def logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (recipe, _) in RUNS.items():
        succeed("distill", recipe, *overrides(name, trained), "--out", folder / name)
    return {name: folder / name for name in RUNS}


# ------------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("reflow", lambda step, told: told == 3),  # while the first pairs are made, before any checkpoint
        ("reflow", lambda step, told: step == 2),
        ("reflow", lambda step, told: step == 4),  # between a stage and the pairs of the next
        ("reflow", lambda step, told: step == 4 and told == 15),  # while these are made
        ("reflow", lambda step, told: step == 9),
        ("windows", lambda step, told: step == 3),
        ("windows", lambda step, told: step == 4),
    ],
)
def test_stopped_and_resumed_gives_the_same_bits(
    name: str, stop: Callable[[int, int], bool], whole: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="go on with"):
        train(config_of(name, trained), run, stop=stop)
    assert not (run / "model").exists()
    train(config_of(name, trained), run, resume=True)
    assert weights(run) == weights(whole[name])
    assert logged(run) == logged(whole[name])
    if name == "reflow":
        assert contents(run / "pairs") == contents(whole[name] / "pairs")


@pytest.mark.parametrize("at", [(0, 3), (0, 5), (4, 3)])
def test_killed_while_pairs_are_made(
    at: tuple[int, int], whole: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    """A copy of the folder taken then is what a kill leaves: in the first or the second file of the teacher's pairs, or
    of the student's."""
    told = 0
    training = run_training(
        config_of("reflow", trained), RunDirectory(tmp_path / "living"), resume=False, overwrite=False
    )
    for progress in training:
        told += progress.step == at[0] and "pairs" in progress.stage
        if told == at[1]:
            shutil.copytree(tmp_path / "living", tmp_path / "run")
            break
    training.close()
    assert (tmp_path / "run" / "checkpoints").exists() == bool(at[0])
    train(config_of("reflow", trained), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole["reflow"])
    assert contents(tmp_path / "run" / "pairs") == contents(whole["reflow"] / "pairs")


def test_resuming_with_other_pairs_is_refused(whole: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole["reflow"], tmp_path / "run"))
    again = ("distill", "digits-reflow", *overrides("reflow", trained), "--out", run, "--resume")
    refuse(*again, "objective.pairs.count=97", says=("objective.pairs.count was 96 and is 97",))
    shutil.rmtree(run / "checkpoints")
    file = run / "pairs" / "round-1" / "meta.json"
    file.write_text(file.read_text().replace('"steps": 3', '"steps": 4'))
    assert "not those of this run" in cli(*again).stderr


# -------------------------------------------------------------------------------------------- whose pairs, and in what


def test_each_round_trains_on_the_pairs_of_what_was_before(whole: dict[str, Path], trained: Path) -> None:
    """The teacher's, then those of the averaged student of each round: solved again here, by the exported weights for
    the last. Every round draws other noise."""
    run = whole["reflow"]
    rounds = [read_pairs(run / "pairs" / f"round-{k}") for k in (1, 2, 3)]
    teacher = load_teacher(RunTeacher(path=str(trained / "teacher")), config_of("reflow", trained).data, digits(), CPU)
    assert [each.request.teacher for each in rounds] == [
        "digits-teacher",
        "digits-reflow, round 1",
        "digits-reflow, round 2",
    ]
    assert rounds[0].request.teacher_digest == teacher.digest
    assert len({each.request.teacher_digest for each in rounds}) == 3
    sampler = load_model(run, CPU).sampler
    assert isinstance(sampler, FieldSampler)
    straightened = sampler.serving(7).field
    rows = torch.arange(96)
    for pairs, field in ((rounds[0], teacher.field), (rounds[2], straightened)):
        x = pairs.data.noise[rows]
        for k in range(3):
            t, r = torch.full((96,), 1 - k / 3), torch.full((96,), 1 - (k + 1) / 3)
            v = field(x, t, rows % 10)
            end = x + (r - t)[:, None, None, None] * v
            x = x + (r - t)[:, None, None, None] * (v + field(end, r, rows % 10)) / 2
        torch.testing.assert_close(pairs.data.x[rows], x, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(rounds[0].data.noise[rows], rounds[1].data.noise[rows]).any()


def test_the_stages_of_a_run(whole: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (whole["reflow"] / "metrics.jsonl").read_text().splitlines()]
    names = ["reflow 1 of 2", "reflow 2 of 2", "distillation to 1 step"]
    assert [line["stage"] for line in lines] == [name for name in names for _ in range(4)]
    assert all(line["residual_by_time"][:7] == 7 * [None] for line in lines[8:])  # at t = 1 alone
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_seconds_count_the_making_of_pairs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from fewstep.distill.reflow import pairs

    made = pairs.solved

    def slowly(*rest):
        time.sleep(0.1)
        return made(*rest)

    monkeypatch.setattr(pairs, "solved", slowly)
    short = ("objective.rounds=1", "objective.distil_steps=null", "train.steps=1")
    train(load_config("digits-reflow", [*overrides("reflow", trained), *short]), tmp_path / "run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["seconds"] > 6 * 0.1


def test_settings_arrive(trained: Path) -> None:
    teacher = load_teacher(RunTeacher(path=str(trained / "teacher")), config_of("reflow", trained).data, digits(), CPU)

    def objective(recipe: str, *own: str):
        config = load_config(recipe, [*student(trained / "teacher"), *own])
        return plan(config, teacher, digits())[0].build(torch.nn.Identity(), None)

    found = objective("digits-two-rectified", "objective.path=cosine", "objective.prediction=data")
    assert isinstance(found, Reflow)
    assert (found.path, found.prediction, found.loss, found.falling) == (COSINE, "data", PseudoHuber(0.00054), True)
    u = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64)
    assert found.times(u).tolist() == pytest.approx([0.004865, 0.5, 0.995135], abs=1e-5)
    own = ("objective.windows=4", "objective.solver=euler", "objective.solver_steps=12", "objective.direction=0.3")
    found = objective("digits-perflow", *own, "objective.start_share=0.25")
    assert isinstance(found, PiecewiseReflow)
    assert (found.windows, found.solver, found.substeps, found.direction) == (4, "euler", 3, 0.3)
    assert found.start_share == 0.25
    assert found.teacher is teacher.field


# ------------------------------------------------------------------------------------------------------ what comes out


def test_a_straightened_flow_is_a_student_and_a_teacher(whole: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    """Sampled at any number of steps, by its own network at one; evaluated as a student with its straightness; and the
    teacher of the next reflow."""
    run = Path(shutil.copytree(whole["reflow"], tmp_path / "run"))
    exported = read_model(run)
    assert (exported.card["role"], exported.card["student"]) == ("student", "velocity")
    assert exported.sampler == {
        "sampler": "euler",
        "steps": {
            "0": {"weights": "model.safetensors"},
            "1": {"weights": "model-steps-1.safetensors", "times": [1.0, 0.0]},
        },
    }
    assert "any number of steps; a network of its own for 1" in (run / "model" / "README.md").read_text()
    for steps, solver, nfe in ((1, (), 1), (3, (), 3), (3, ("--solver", "heun"), 6), (1, ("--solver", "heun"), 1)):
        printed = succeed("sample", run, "--steps", steps, "--n", 4, *solver, "--json").stdout
        assert json.loads(printed)["nfe"] == nfe
    succeed("evaluate", run)
    rows = {(row["role"], row["steps"]): row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert set(rows) == {("teacher", 4), ("student", 1), ("student", 4)}
    assert "straightness" in rows["student", 4]["metrics"]
    assert "straightness" not in rows["student", 1]["metrics"]  # its samples are another network's
    succeed("report", run)
    folder = tmp_path / "pairs"
    succeed("data", "pairs", run, "--out", folder, "--n", 64, "--steps", 2)
    own = (*student(run), "train.steps=2", "objective.distil_steps=null", f"objective.pairs={folder}")
    succeed("distill", "digits-reflow", *own, "--out", tmp_path / "again")
    refuse(
        "distill", "digits-reflow", *own, "teacher.guidance=2", "--out", tmp_path / "no", says=("guidance built in",)
    )
    told = succeed("distill", "digits-progressive", *student(run), "train.steps=1", "--out", tmp_path / "off").stderr
    assert "warning: the teacher's flow was straightened on pairs" in told


def test_the_last_checkpoint_of_a_round_is_what_its_pairs_come_from(whole: dict[str, Path]) -> None:
    """The averaged weights that are kept of the last round are those exported."""
    run = whole["reflow"]
    kept = read_tensors(run / "model" / "model.safetensors", read_model(run).digest())
    stage = (run / "stages" / "steps-0000.safetensors").read_bytes()
    from safetensors.torch import load

    for name, value in load(stage).items():
        assert torch.equal(value, kept[name]), name


def test_windows_serve_their_number_and_multiples(whole: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole["windows"], tmp_path / "run"))
    steps = read_model(run).sampler["steps"]
    assert {count: (entry["times"][1], entry["multiples"]) for count, entry in steps.items()} == {
        "2": (0.5, True),
        "4": (0.75, True),
    }
    for count in (2, 4, 6, 8):
        assert json.loads(succeed("sample", run, "--steps", count, "--n", 4, "--json").stdout)["nfe"] == count
    refuse("sample", run, "--steps", 3, says=("2 steps and multiples, 4 steps and multiples, not for 3 steps",))
    refuse("sample", run, "--steps", 4, "--solver", "heun", says=("its own sampling rule",))
    served = load_model(run, CPU).sampler
    assert isinstance(served, FieldSampler)
    assert [served.serving(count).steps for count in (2, 4, 6, 8)] == [2, 4, 2, 4]
    assert isinstance(served.serving(2).field, NetworkField)


def test_a_flow_may_be_sampled_with_its_noise_fixed(trained: Path, tmp_path: Path) -> None:
    """Two steps go by the line to the first noise, as the exported rule says; another solver may be asked for."""
    run = tmp_path / "run"
    own = (*student(trained / "teacher"), PAIRS, "train.steps=2")
    succeed("distill", "digits-two-rectified", *own, "--out", run)
    assert read_model(run).sampler["sampler"] == "fixed_noise"
    sampler = load_model(run, CPU).sampler
    assert sampler.name == "fixed_noise"
    index = torch.arange(5)
    e, label = torch.randn(5, 1, 8, 8), index % 10
    field = sampler.serving(2).field
    half = torch.full((5,), 0.5)
    middle = 0.5 * (e - field(e, torch.ones(5), label)) + 0.5 * e
    wanted = middle - 0.5 * field(middle, half, label)
    torch.testing.assert_close(sampler(2, e, label, Key(0), index).x, wanted)
    assert json.loads(succeed("sample", run, "--steps", 2, "--n", 2, "--solver", "heun", "--json").stdout)["nfe"] == 4


# -------------------------------------------------------------------------------------------------------- what is wrong

WRONG = {
    "objective.windows=[2, 4]": ("objective.windows", "fewer windows than the one before, got 2, 4"),
    "objective.windows=[4, 4]": ("objective.windows", "fewer windows"),
    "objective.windows=0": ("objective.windows", "0"),
    "objective.solver_steps=10": ("objective.solver_steps", "10 steps of the solver do not divide among 4 windows"),
    "objective.direction=-1": ("objective.direction", "-1"),
    "objective.start_share=1": ("objective.start_share", "1"),
    "student.kind=average_velocity": ("piecewise_reflow trains a student of kind velocity",),
    "teacher=null": ("student.init teacher needs a teacher block",),
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_windows(override: str) -> None:
    refuse("distill", "digits-perflow", override, "--dry-run", says=WRONG[override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.pairs.cuont=3", ("objective.pairs.cuont", "did you mean 'count'?")),
        ("objective.pairs=3", ("objective.pairs", "3")),
        ("objective.rounds=0", ("objective.rounds", "0")),
        ("objective.loss.kind=cauchy", ("objective.loss.kind", "'cauchy'")),
        ("objective.sampler=rk4", ("objective.sampler", "'fixed_noise'", "'rk4'")),
        (
            "train={ema: [{kind: power}, {kind: power, relative_std: 0.2}], ema_snapshot_every: 2}",
            ("train.ema_snapshot_every has no meaning over the stages of objective reflow",),
        ),
    ],
)
def test_wrong_reflow(override: str, says: tuple[str, ...]) -> None:
    refuse("distill", "digits-reflow", override, "--dry-run", says=says)


def test_a_folder_of_pairs_may_be_named_alone() -> None:
    found = load_config("digits-reflow", ["objective.pairs=somewhere"]).objective
    assert found.pairs.path == "somewhere"
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        load_config("digits-reflow", ["objective.pair=somewhere"])
