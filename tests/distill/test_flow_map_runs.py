"""Runs of the family from the command line: stages, checkpoints, what each kind of model serves, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, contents, refuse, succeed
from safetensors.torch import load_file

from fewstep.checkpoint import RunDirectory, read_checkpoint
from fewstep.config import load_config
from fewstep.data.load import load_data
from fewstep.distill.flow_maps.objective import FlowMapMatching
from fewstep.distill.flow_maps.trajectory import TrajectoryRegression
from fewstep.distill.plan import plan
from fewstep.distill.run import Interrupted, run_training
from fewstep.teachers.guided import ClassContrast, GuidedField, WeakContrast
from fewstep.teachers.load import load_teacher
from fewstep.teachers.network import NetworkField

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of the digits, a weaker one, and one of data without classes."""
    folder = tmp_path_factory.mktemp("runs")
    boards = "data={kind: toy, name: checkerboard, count: 200}"
    succeed("teach", "digits-teacher", *SMALL, "train.steps=6", "--out", folder / "teacher")
    succeed("teach", "digits-teacher", *SMALL, "train.steps=2", "seed=1", "--out", folder / "weak")
    succeed("teach", "digits-teacher", *SMALL, boards, "train.steps=1", "--out", folder / "boards")
    succeed("teach", "digits-teacher", *SMALL, boards, "train.steps=1", "seed=1", "--out", folder / "weak boards")
    return folder


def overrides(runs: Path, objective: str, *more: str) -> list[str]:
    return [
        *SMALL[:2],
        f"teacher.path={runs / 'teacher'}",
        f"objective={objective}",
        "train.steps=10",
        "train.checkpoint_every=4",
        *more,
    ]


def train(given: list[str], run: Path, *, stop_at: int | None = None, resume: bool = False) -> None:
    reached = 0

    def stopped() -> bool:
        return stop_at is not None and reached + 1 >= stop_at

    config = load_config("digits-meanflow", given)
    for progress in run_training(config, RunDirectory(run), resume=resume, overwrite=False, stopped=stopped):
        reached = progress.step


def exported(run: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert files
    return files


def logged(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ stopped and resumed

KINDS = {
    "likelihood": "{kind: meanflow, weight: {kind: log_variance}}",
    "likelihood and target": "{kind: terminal_velocity, target_decay: 0.9, weight: {kind: cauchy}}",
    # Stages of four and six steps.
    "warm start": "{kind: alpha_flow, weight: {kind: log_variance}, warm_start: {steps: 4, nodes: 4}}",
    "warm free flow": "{kind: free_flow, warm_start: {steps: 4, nodes: 4, solver: euler}}",
}
STOPS = [
    ("likelihood", 3),
    ("likelihood and target", 6),
    # Inside the first stage, at its end, one step into the second, at its end.
    *(("warm start", step) for step in (2, 4, 5, 10)),
    ("warm free flow", 7),
]


@pytest.fixture(scope="module")
def whole(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name, objective in KINDS.items():
        train(overrides(runs, objective), folder / name)
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize(("kind", "stop"), STOPS)
def test_stopped_and_resumed_gives_the_same_bits(
    kind: str, stop: int, whole: dict[str, Path], runs: Path, tmp_path: Path
) -> None:
    """The model, and everything of the last checkpoint: what an objective learns for itself and its moments too."""
    given, run = overrides(runs, KINDS[kind]), tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of 10"):
        train(given, run, stop_at=stop)
    train(given, run, resume=True)
    assert exported(run) == exported(whole[kind])
    assert [line["step"] for line in logged(run)] == list(range(1, 11))
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "step-00000010").groups for folder in (run, whole[kind]))
    assert ours.keys() == theirs.keys()
    for group, tensors in theirs.items():
        assert ours[group].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(ours[group][name], value), (group, name)


@pytest.mark.parametrize("step", [4, 10])
def test_killed_before_a_checkpoint_that_was_due(
    step: int, whole: dict[str, Path], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a stage its student is written before the checkpoint that says so: a power cut between the two
    leaves an older checkpoint, which must not find the file of another stage in its place."""
    import fewstep.distill.run as running

    class Killed(BaseException):
        pass

    save, given, run = running._save, overrides(runs, KINDS["warm start"]), tmp_path / "run"

    def cut(directory: RunDirectory, at: int, *arguments: object) -> None:
        if at == step:
            raise Killed
        save(directory, at, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(running, "_save", cut)
        with pytest.raises(Killed):
            train([*given, "train.checkpoint_every=3"], run)
    train([*given, "train.checkpoint_every=3"], run, resume=True)
    assert exported(run) == exported(whole["warm start"])


def test_what_is_learned_beside_the_student_is_kept_and_not_exported(whole: dict[str, Path]) -> None:
    for kind, prefix in (("likelihood", "weight.log_variance."), ("warm free flow", "fake.")):
        last = read_checkpoint(whole[kind] / "checkpoints" / "step-00000010").groups
        first = read_checkpoint(whole[kind] / "checkpoints" / "step-00000008").groups
        assert {name.startswith(prefix) for name in last["objective"]} == {True}
        moved = [name for name, value in last["objective"].items() if not torch.equal(value, first["objective"][name])]
        assert len(moved) == len(last["objective"])
        weights = load_file(whole[kind] / "model" / "model.safetensors")
        assert set(weights) == set(last["student"]) == set(last["ema-0.999"])
        # Adam has two moments and a count for each.
        assert len(last["optimizer"]) == 3 * (len(last["student"]) + len(last["objective"]))


# -------------------------------------------------------------------------------------------------------- warm starts


def test_a_warm_start_is_a_stage_of_its_own(whole: dict[str, Path]) -> None:
    stages = [line["stage"] for line in logged(whole["warm start"])]
    assert stages == 4 * ["trajectory regression"] + 6 * ["alpha flow"]
    assert [path.name for path in (whole["warm start"] / "model").glob("*.safetensors")] == ["model.safetensors"]
    card = json.loads((whole["warm start"] / "model" / "config.json").read_text())
    assert card["objective"] == "alpha_flow"
    assert card["train"]["steps"] == 10


def test_the_stage_after_a_warm_start_goes_on_with_its_weights(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first forward pass sees the weights that the last step of the first stage left; its keys go on counting; its
    schedules start at zero and are one step short of the end at the last."""
    objective = "{kind: alpha_flow, warm_start: {steps: 4, nodes: 4}}"
    seen: list[tuple[str, int, float, torch.Tensor]] = []
    for kind in (TrajectoryRegression, FlowMapMatching):

        def noted(self, batch, key, forward=kind.forward):  # type: ignore[no-untyped-def]
            done = self.done(key.step) if isinstance(self, FlowMapMatching) else -1.0
            weights = torch.cat([value.detach().flatten() for value in self.student.parameters()])
            seen.append((type(self).__name__, key.step, done, weights))
            return forward(self, batch, key)

        monkeypatch.setattr(kind, "forward", noted)
    given, run = overrides(runs, objective, "train.checkpoint_every=1", "train.keep_checkpoints=20"), tmp_path / "run"
    train(given, run)
    assert [name for name, *_ in seen] == 4 * ["TrajectoryRegression"] + 6 * ["FlowMapMatching"]
    assert [step for _, step, *_ in seen] == list(range(10))
    assert [done for *_, done, _ in seen[4:]] == [k / 6 for k in range(6)]
    student = read_checkpoint(run / "checkpoints" / "step-00000004").groups["student"]
    names = [name for name, _ in load_student(given).named_parameters()]
    assert torch.equal(seen[4][3], torch.cat([student[name].flatten() for name in names]))
    assert not torch.equal(seen[4][3], seen[0][3])


def load_student(given: list[str]) -> torch.nn.Module:
    from fewstep.distill.run import check_training

    config = load_config("digits-meanflow", given)
    run = RunDirectory(Path("nowhere to be"))
    return check_training(config, run, CPU, processes=1, resume=False, overwrite=False).student


def test_schedules_without_a_warm_start_span_the_training(runs: Path) -> None:
    config = load_config("digits-meanflow", overrides(runs, "{kind: soflow}"))
    (stage,) = plan(config, None, load_data(config.data))
    objective = stage.build(load_student(overrides(runs, "{kind: soflow}")), None)
    assert isinstance(objective, FlowMapMatching)
    assert [objective.done(step) for step in (0, 5, 9)] == [0.0, 0.5, 0.9]
    assert (stage.name, stage.steps, stage.serves) == ("soflow", 10, 0)


@pytest.mark.parametrize("steps", [10, 11])
def test_a_warm_start_leaves_something_to_do(steps: int, runs: Path, tmp_path: Path) -> None:
    refuse(
        *("distill", "digits-meanflow", *overrides(runs, f"{{kind: meanflow, warm_start: {{steps: {steps}}}}}")),
        *("--out", tmp_path / "run"),
        says=(f"objective.warm_start.steps {steps}", "train.steps 10", "meanflow"),
    )
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- whole groups of a batch


@pytest.mark.parametrize(
    ("objective", "place"),
    [
        ("{kind: trajectory, nodes: 6}", "objective.nodes 6"),
        ("{kind: trajectory}", "objective.nodes 16"),
        ("{kind: meanflow, warm_start: {steps: 2, nodes: 6}}", "objective.warm_start.nodes 6"),
    ],
)
def test_a_microbatch_holds_whole_trajectories(objective: str, place: str, runs: Path, tmp_path: Path) -> None:
    """Sixteen samples in two microbatches of eight."""
    given = overrides(runs, objective, "train.gradient_accumulation_steps=2")
    refuse(
        *("distill", "digits-meanflow", *given, "--out", tmp_path / "run"),
        says=("a microbatch of 8 samples", place, "train.batch_size"),
    )
    assert not (tmp_path / "run").exists()
    if "16" in place:  # as it is
        whole = [part for part in given if "accumulation" not in part]
        succeed("distill", "digits-meanflow", *whole, "train.steps=1", "--out", tmp_path / "run")
        refuse(
            *("distill", "digits-meanflow", *whole, "--processes", 2, "--out", tmp_path / "two"),
            says=("a microbatch of 8 samples", place),
        )


# ---------------------------------------------------------------------------------------------- what FreeFlow serves


def test_a_student_of_noise_serves_one_step(whole: dict[str, Path], tmp_path: Path) -> None:
    run = whole["warm free flow"]
    sampler = json.loads((run / "model" / "sampler.json").read_text())
    assert sampler["steps"] == {"1": {"weights": "model.safetensors", "times": [1.0, 0.0]}}
    before = contents(run)
    refuse("sample", run, "--steps", 2, "--n", 4, "--out", tmp_path / "two", says=("1",))
    assert contents(run) == before
    succeed("sample", run, "--steps", 1, "--n", 4, "--out", tmp_path / "one")
    succeed("sample", whole["warm start"], "--steps", 2, "--n", 4, "--out", tmp_path / "any")


# ------------------------------------------------------------------------------------------------------ weak teachers


def test_a_weaker_teacher_is_the_contrast(runs: Path) -> None:
    """Guidance goes away from it, for two evaluations; without guidance the field is the teacher's own. Its digest is
    neither's, so that a run does not go on with another one."""
    paths = [f"teacher.path={runs / 'teacher'}", f"teacher.weak={runs / 'weak'}"]

    def load(*more: str):  # type: ignore[no-untyped-def]
        config = load_config("digits-meanflow", [*SMALL[:2], *more, "objective.velocity=teacher"])
        data = load_data(config.data)
        assert config.teacher is not None
        return load_teacher(config.teacher, config.data, data, CPU)

    both, alone = load(*paths, "teacher.guidance=2.5"), load(paths[0])
    weak, swapped = (
        load(f"teacher.path={runs / 'weak'}"),
        load(f"teacher.path={runs / 'weak'}", f"teacher.weak={runs / 'teacher'}"),
    )
    assert isinstance(both.contrast, WeakContrast)
    assert isinstance(both.field, GuidedField)
    assert both.field.nfe == both.contrast.nfe == 2
    assert isinstance(alone.contrast, ClassContrast)
    assert isinstance(alone.field, NetworkField)
    assert isinstance(load(*paths).field, NetworkField)
    assert len({one.digest for one in (both, alone, weak, swapped)}) == 4
    assert load(*paths).digest == both.digest
    x, t, label = torch.randn(6, 1, 8, 8), torch.linspace(0.1, 0.9, 6), torch.arange(6)
    good, bad = alone.field(x, t, label), weak.field(x, t, label)
    assert (good - bad).abs().max() > 1e-3
    torch.testing.assert_close(both.field(x, t, label), bad + 2.5 * (good - bad))
    assert (both.params, both.name) == (alone.params, alone.name)
    for one, other in zip(both.net.parameters(), alone.net.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)  # a student starts from the better one


def test_a_student_of_two_teachers(runs: Path, tmp_path: Path) -> None:
    """Guidance by a weaker model works on data without classes, and folds into training; the run does not go on without
    it."""
    data = "data={kind: toy, name: checkerboard, count: 200}"
    given = [
        *(part for part in overrides(runs, "{kind: meanflow, guidance: {scale: 2, high: 0.8}}") if "path" not in part),
        *(data, f"teacher.path={runs / 'boards'}", "evaluate.features=[points]", "train.steps=4"),
    ]
    weak = f"teacher.weak={runs / 'weak boards'}"
    refuse(
        *("distill", "digits-meanflow", *given, "--out", tmp_path / "run"),
        says=("objective.guidance", "neither classes nor a weaker one"),
    )
    assert not (tmp_path / "run").exists()
    succeed("distill", "digits-meanflow", *given, weak, "--out", tmp_path / "run")
    again = tmp_path / "moved"
    shutil.copytree(runs / "weak boards", again)
    shutil.copytree(runs / "boards", tmp_path / "same", dirs_exist_ok=True)
    refuse(
        *("distill", "digits-meanflow", *given, f"teacher.weak={tmp_path / 'same'}", "--out", tmp_path / "run"),
        "--resume",
        says=("teacher.weak was",),
    )
    shutil.rmtree(runs / "weak boards")
    shutil.copytree(runs / "boards", runs / "weak boards")
    refuse(
        *("distill", "digits-meanflow", *given, weak, "--out", tmp_path / "run", "--resume"),
        says=("weights have changed",),
    )
    shutil.rmtree(runs / "weak boards")
    shutil.copytree(again, runs / "weak boards")


def test_what_a_weaker_teacher_may_not_be(runs: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        str(runs / "none"): ("has not been trained",),
        str(whole["likelihood"]): ("holds a student", "not a teacher"),
        str(runs / "boards"): ("trained on toy-checkerboard", "the data here are digits"),
    }
    for path, words in cases.items():
        refuse(
            *("distill", "digits-meanflow", *overrides(runs, "{kind: meanflow}", f"teacher.weak={path}")),
            *("--out", tmp_path / "run"),
            says=(path, *words),
        )
    boards = ("data={kind: toy, name: checkerboard, count: 200}", f"teacher.path={runs / 'boards'}")
    refuse(
        *("distill", "digits-meanflow", *overrides(runs, "{kind: meanflow, velocity: teacher}", *boards)),
        *("teacher.guidance=2", "--out", tmp_path / "run"),
        says=("teacher.guidance 2", "teacher.weak", "no classes"),
    )
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- what is refused


def test_self_guidance_without_classes(runs: Path, tmp_path: Path) -> None:
    boards = ("data={kind: toy, name: checkerboard, count: 200}", f"teacher.path={runs / 'boards'}")
    given = overrides(runs, "{kind: meanflow, velocity: data, guidance: {scale: 2}}", *boards)
    refuse(
        *("distill", "digits-meanflow", *given, "--out", tmp_path / "run"),
        says=("objective.guidance with velocity data needs classes",),
    )
    assert not (tmp_path / "run").exists()


def test_a_correction_needs_gaussian_noise(runs: Path, tmp_path: Path) -> None:
    """What samples are re-noised with is what the teacher knows."""
    teacher = tmp_path / "teacher"
    succeed("teach", "digits-teacher", *SMALL, "objective.noise.source=uniform", "train.steps=1", "--out", teacher)
    given = overrides(runs, "{kind: free_flow}", f"teacher.path={teacher}")
    refuse(
        *("distill", "digits-meanflow", *given, "--out", tmp_path / "run"),
        says=("objective.correction", "uniform", "set it to 0"),
    )
    assert not (tmp_path / "run").exists()
    succeed(
        *("distill", "digits-meanflow", *given, "objective.correction=0", "train.steps=1"), "--out", tmp_path / "zero"
    )
