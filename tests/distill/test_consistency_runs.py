"""Runs of the consistency family from the command line: stages, resumption, what each model serves, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, refuse, succeed

from fewstep.checkpoint import RunDirectory, read_checkpoint
from fewstep.config import load_config
from fewstep.data.load import load_data
from fewstep.distill.consistency.objective import AlongTeacher, ConsistencyMatching, along_data
from fewstep.distill.consistency.schedules import Doubling, SquareRoot, WholeDoubling
from fewstep.distill.consistency.steps import GridSteps, LevelSteps, karras_nodes
from fewstep.distill.plan import plan
from fewstep.distill.run import Interrupted, run_training
from fewstep.teachers.load import load_teacher

CPU = torch.device("cpu")

KINDS = {
    "consistency training": ("consistency", "{kind: consistency, velocity: data, schedule: square_root, nodes: 16}"),
    "improved consistency": ("consistency", "{kind: improved_consistency, start_nodes: 5, nodes: 20}"),
    # A new stage of steps at 4 and at 7.
    "easy consistency": ("consistency", "{kind: easy_consistency, stages: 3}"),
    "continuous consistency": ("consistency", "{kind: continuous_consistency, velocity: teacher, warmup_steps: 6}"),
    # Two stages of training, of ten and of five steps.
    "truncated consistency": ("consistency", "{kind: truncated_consistency, stages: 3, second_stage_factor: 0.5}"),
    "phased consistency": ("average_velocity", "{kind: phased_consistency, segments: [2, 3], shrink: 0.3}"),
    # Four steps of flow matching on segments and six of consistency.
    "consistency flow matching": ("average_velocity", "{kind: consistency_flow_matching, straight_steps: 4}"),
    "self-corrected": ("consistency", "{kind: self_corrected}"),
}
STOPS = [
    ("consistency training", 3),
    ("improved consistency", 6),
    ("easy consistency", 5),
    ("continuous consistency", 5),
    *(("truncated consistency", step) for step in (4, 10, 12)),
    ("phased consistency", 7),
    *(("consistency flow matching", step) for step in (2, 4, 7)),
    ("self-corrected", 3),
]
SERVES = {
    "truncated consistency": [1, 2],
    "phased consistency": [2, 3],
    "consistency flow matching": [2],
}
"""Step counts of the models that are not for any."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    succeed("teach", "digits-teacher", *SMALL, "train.steps=6", "--out", folder)
    return folder


def overrides(teacher: Path, kind: str, objective: str, *more: str) -> list[str]:
    return [
        *SMALL[:2],
        f"teacher.path={teacher}",
        f"student.kind={kind}",
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


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind through the command line, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (kind, objective) in KINDS.items():
        succeed("distill", "digits-meanflow", *overrides(teacher, kind, objective), "--out", folder / name)
    return {name: folder / name for name in KINDS}


@pytest.mark.parametrize(("name", "stop"), STOPS)
def test_stopped_and_resumed_gives_the_same_bits(
    name: str, stop: int, whole: dict[str, Path], teacher: Path, tmp_path: Path
) -> None:
    """The model, and everything of the last checkpoint: targets, learned weights, the stage that was frozen."""
    given, run = overrides(teacher, *KINDS[name]), tmp_path / "run"
    with pytest.raises(Interrupted, match=f"stopped at step {stop} of "):
        train(given, run, stop_at=stop)
    train(given, run, resume=True)
    assert exported(run) == exported(whole[name])
    last = sorted((run / "checkpoints").iterdir())[-1].name
    ours, theirs = (read_checkpoint(folder / "checkpoints" / last).groups for folder in (run, whole[name]))
    assert ours.keys() == theirs.keys()
    assert ("previous" in theirs) == (name in ("truncated consistency", "consistency flow matching"))
    for group, tensors in theirs.items():
        assert ours[group].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(ours[group][key], value), (group, key)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_model_serves(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """Its own step counts, from one file of weights; others are refused by name, or there are none."""
    run = whole[name]
    assert list(exported(run)) == ["model.safetensors"]
    steps = json.loads((run / "model" / "sampler.json").read_text())["steps"]
    assert [int(count) for count in steps] == SERVES.get(name, [0])
    for count in SERVES.get(name, [1, 3]):
        succeed("sample", run, "--steps", count, "--n", 4, "--out", tmp_path / f"{count}.png")
    if name in SERVES:
        listed = ", ".join(map(str, SERVES[name]))
        refuse("sample", run, "--steps", 4, "--out", tmp_path / "4.png", says=(f"{listed} steps", "not for 4"))


def test_stages_of_training(whole: dict[str, Path]) -> None:
    def logged(name: str) -> list[str]:
        lines = (whole[name] / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["stage"] for line in lines]

    assert logged("truncated consistency") == ["easy consistency"] * 10 + ["truncated consistency"] * 5
    segments = ["flow matching on segments"] * 4 + ["consistency flow matching"] * 6
    assert logged("consistency flow matching") == segments
    assert set(logged("self-corrected")) == {"self corrected"}


def test_settings_arrive(teacher: Path) -> None:
    """In the objective of the first stage."""

    def built(kind: str, objective: str) -> ConsistencyMatching:
        config = load_config("digits-meanflow", overrides(teacher, kind, objective))
        data = load_data(config.data)
        assert config.teacher is not None
        stage = plan(config, load_teacher(config.teacher, config.data, data, CPU), data)[0]
        found = stage.build(torch.nn.Linear(1, 1), None)
        assert isinstance(found, ConsistencyMatching)
        return found

    steps = built("consistency", "{kind: consistency, nodes: 16}").steps
    assert isinstance(steps, GridSteps)
    assert steps.intervals == Doubling(4, 16, 10)
    found = built(*KINDS["consistency training"])
    assert isinstance(found.steps, GridSteps)
    assert found.steps.intervals == SquareRoot(4, 16, 10)
    assert found.nearer is along_data
    found = built(*KINDS["improved consistency"])
    assert isinstance(found.steps, GridSteps)
    assert (found.steps.nodes, found.steps.intervals) == (karras_nodes, WholeDoubling(5, 20, 10))
    assert found.steps.log_normal == (-1.1, 2.0)
    found = built("consistency", "{kind: easy_consistency, stages: 3, base: 4, velocity: teacher, solver: midpoint}")
    assert isinstance(found.nearer, AlongTeacher)
    assert found.nearer.solver == "midpoint"
    assert isinstance(found.steps, LevelSteps)
    assert [found.steps.share(k) for k in (3, 4, 9)] == [1 / 4, 1 / 16, 1 / 64]


TEACHER = "teacher={kind: run, path: x}"
REFUSED = {
    "another student": (
        ["objective={kind: phased_consistency}", "student.kind=consistency"],
        ("objective phased_consistency trains a student of kind average_velocity",),
    ),
    "no teacher": (
        [
            "objective={kind: self_corrected}",
            "student.kind=consistency",
            "teacher=null",
            "student.init=scratch",
            SMALL[2],
        ],
        ("objective self_corrected needs a teacher block",),
    ),
    "guidance without effect": (
        ["objective={kind: easy_consistency}", "student.kind=consistency", "teacher.guidance=2"],
        ("teacher.guidance has no effect with objective.velocity data",),
    ),
    "points that are close": (
        ["objective={kind: consistency_flow_matching}", "train.precision=bf16"],
        ("objective consistency_flow_matching needs train.precision fp32",),
    ),
    "segments twice": (["objective={kind: phased_consistency, segments: [2, 2]}"], ("lists a number twice: 2, 2",)),
    "more segments than nodes": (
        ["objective={kind: phased_consistency, segments: [8], nodes: 4}"],
        ("4 nodes do not hold 8 segments",),
    ),
    "ends a teacher does not know": (
        ["objective={kind: consistency_flow_matching, velocity: teacher, near_data: 0.1}"],
        ("near_data needs velocity data",),
    ),
    "straight ends of a teacher": (
        ["objective={kind: consistency_flow_matching, velocity: teacher, straight_steps: 4}"],
        ("straight_steps needs velocity data",),
    ),
    "two distances": (
        ["objective={kind: consistency, huber: 1, distance: {kind: absolute}}", "student.kind=consistency"],
        ("huber and distance exclude each other",),
    ),
    "nothing to follow": (
        ["objective={kind: consistency, target_follows_nodes: true}", "student.kind=consistency"],
        ("target_follows_nodes needs a target_decay",),
    ),
    "a grid that shrinks": (
        ["objective={kind: consistency, schedule: square_root, start_nodes: 8, nodes: 4}", "student.kind=consistency"],
        ("nodes 4 are fewer than start_nodes 8",),
    ),
    "a boundary above the second step": (
        ["objective={kind: truncated_consistency, truncated_times: {sigma_min: 2}}", "student.kind=consistency"],
        ("sigma_min 2 lies above 1",),
    ),
    "snapshots over stages": (
        [
            "objective={kind: truncated_consistency}",
            "student.kind=consistency",
            "train.ema=[{kind: power}, {kind: power, relative_std: 0.05}]",
            "train.ema_snapshot_every=5",
        ],
        ("ema_snapshot_every has no meaning over the stages of objective truncated_consistency",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, words = REFUSED[case]
    refuse("distill", "digits-meanflow", *given, "--dry-run", says=words)


def test_no_steps_left(teacher: Path, tmp_path: Path) -> None:
    for kind, objective, words in (
        ("average_velocity", "{kind: consistency_flow_matching, straight_steps: 10}", "leaves none of train.steps 10"),
        ("consistency", "{kind: truncated_consistency, second_stage_factor: 0.01}", "truncated consistency has no"),
    ):
        given = overrides(teacher, kind, objective)
        refuse("distill", "digits-meanflow", *given, "--out", tmp_path / "run", says=(words,))


def test_from_data_alone(tmp_path: Path) -> None:
    """Without any teacher, from scratch."""
    given = [
        *SMALL,
        "teacher=null",
        "student={kind: consistency, init: scratch, network: {kind: mlp, width: 16, depth: 1}}",
    ]
    run = tmp_path / "run"
    succeed("distill", "digits-meanflow", *given, "objective={kind: easy_consistency}", "train.steps=2", "--out", run)
    assert json.loads((run / "model" / "config.json").read_text())["teacher"] is None
