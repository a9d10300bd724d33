"""Teachers from Python code, and `fewstep teacher check`, as a user types it."""

import json
from pathlib import Path

import pytest
from conftest import cli, refuse, succeed

CODE = """\
import torch
from torch import nn

CALLS = []
KINDS = dict(right=(1, 1, 1), sign=(-1, 1, 1), time=(1, -1, 1), both=(-1, -1, 1), scale=(1, 1, 1000))


def exact(kind):
    from fewstep.data.toys import EIGHT_GAUSSIANS
    from fewstep.teachers.analytic import MixtureTeacher

    teacher, (sign, way, scale) = MixtureTeacher.from_spec(EIGHT_GAUSSIANS), KINDS[kind]

    def model(x, time, label):
        t = time / scale
        return sign * teacher(x, t if way == 1 else 1 - t, label)

    return model


right, sign, time, both, scale = map(exact, KINDS)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.drift = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x, t, label):
        return self.drift.expand_as(x)


def aside(x, t, label):
    from fewstep.teachers.analytic import GaussianTeacher

    return GaussianTeacher(0.4, 0.6)(x, t)


def wide(x, t, label):
    return torch.cat((x, x), dim=1)


def fails(x, t, label):
    raise KeyError("weights")


number = 3
"""
CONFIG = """\
name: mine
data: {kind: toy, name: eight_gaussians, count: 2000}
teacher: {kind: python, target: "TARGET"}
student: {kind: average_velocity, init: scratch, network: {kind: mlp, width: 16, depth: 1}}
objective: {kind: meanflow, velocity: teacher, times: {kind: uniform}}
train: {steps: 3, batch_size: 16, warmup_steps: 0, checkpoint_every: 3}
evaluate: {steps: [1], teacher_steps: [4], n: 100, features: [identity]}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_models.py").write_text(CODE)
    (tmp_path / "mine.yaml").write_text(CONFIG.replace("TARGET", "my_models:right"))
    monkeypatch.chdir(tmp_path)
    return "mine.yaml"


MISTAKES = {
    "sign": ("velocity_to: data", {"velocity_to": "data"}),
    "time": ("noise_at: 0", {"noise_at": "0"}),
    "both": ("noise_at: 0, velocity_to: data", {"noise_at": "0", "velocity_to": "data"}),
    "scale": ("time_scale: 1000", {"time_scale": "1000"}),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_each_wrong_declaration_is_named_and_its_remedy_is_right(kind: str, config: str) -> None:
    remedy, fields = MISTAKES[kind]
    target = f"teacher.target=my_models:{kind}"
    result = cli("teacher", "check", config, target, "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert (found["best"], found["right"]) == (remedy, False)
    assert f"with {remedy}, and" in result.stderr.splitlines()[-1]
    better = [f"teacher.convention.{name}={value}" for name, value in fields.items()]
    assert "is read right" in succeed("teacher", "check", config, target, *better).stderr


def test_a_right_one_and_what_it_shows(config: str) -> None:
    result = succeed("teacher", "check", config, "--json")
    found = json.loads(result.stdout)
    assert (found["best"], found["right"], found["n"]) == ("as declared", True, 512)
    assert found["losses"]["as declared"] == min(found["losses"].values())
    assert len(found["losses"]) == 5
    assert "right" in result.stderr.splitlines()[-1]


def test_a_network_of_other_data_has_samples_elsewhere(config: str) -> None:
    """Least loss as declared is not enough: this one knows data that lie elsewhere."""
    result = cli("teacher", "check", config, "teacher.target=my_models:aside")
    assert result.exit_code == 4
    assert "has the least loss as it is declared, but samples of mean" in result.stderr


def test_a_network_that_knows_nothing_is_no_teacher(config: str) -> None:
    """It is as wrong whatever is declared, and its samples drift away."""
    result = cli("teacher", "check", config, "teacher.target=my_models:Net", "--json")
    assert result.exit_code == 4
    assert "says nothing of these data in any reading: its loss is" in result.stderr
    found = json.loads(result.stdout)
    assert not found["right"]
    assert found["silent"] < min(found["losses"].values())


def test_teachers_of_runs_and_of_formulas_are_checked_too(config: str) -> None:
    for kind in ("", "teacher.guidance=1.0"):
        said = succeed("teacher", "check", config, "teacher.kind=analytic", *([kind] if kind else [])).stderr
        assert "its time reversed and its sign turned" in said
        assert "exact eight_gaussians is read right" in said


def test_a_student_of_it_trains_is_measured_and_knows_it(config: str, tmp_path: Path) -> None:
    succeed("distill", config, "--out", "run")
    succeed("evaluate", "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {(row["model"], row["role"]) for row in rows["rows"]} == {("mine", "student"), ("right", "teacher")}
    assert {model["objective"] for model in rows["models"]} == {"meanflow", "python"}
    card = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert card["teacher"] == "right"
    # Read otherwise, it is another teacher.
    succeed("distill", config, "teacher.convention.time_scale=2", "--out", "other")
    other = json.loads((tmp_path / "other" / "model" / "config.json").read_text())
    assert other["teacher_digest"] != card["teacher_digest"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("my_models:none", "AttributeError"),
        ("no_such_package:f", "ModuleNotFoundError"),
        ("my_models:number", "is a int: it has to be a function"),
        ("my_models:wide", "gives a tensor [2, 4] for x [2, 2]"),
        ("my_models:fails", "fails on x [2, 2]: KeyError"),
    ],
)
def test_what_is_no_teacher(target: str, says: str, config: str) -> None:
    refuse("teacher", "check", config, f"teacher.target={target}", says=("teacher.target", says))


def test_configs_that_do_not_fit(config: str) -> None:
    refuse("teacher", "check", "digits-teacher", says=("has no teacher block",))
    refuse("distill", config, "student.init=teacher", "--dry-run", says=("student.init scratch",))
    refuse("distill", config, "teacher.target=nothing", "--dry-run", says=("teacher.target",))
    refuse("distill", config, "teacher.guidance=2", "data.classes=false", "--out", "x", says=("teacher.guidance",))
